"""What takes space, and what `gc` removes: nothing that a recipe, a server or a recent run needs."""

from __future__ import annotations

import datetime
import json
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy

from forge import space
from forge.executor import kept
from forge.executor.docker import Docker
from forge.executor.engine import answers
from forge.executor.local import Local


def lying(mini, kind="artifacts"):
    return sorted(
        str(p.relative_to(mini.home / "store" / kind))[:12] for p in mini.home.glob(f"store/{kind}/*/*")
    )


def unused(mini, keep=0):
    items, _ = space.items(mini.context(), Local(mini.repo, mini.home), keep)
    return [item for item in items if not item.users]


@pytest.fixture
def two(mini):
    """Two generations of every artifact."""
    assert mini.run().code == 0
    toy.edit(mini.recipe, "upper: false", "upper: false\n    times: 2")
    assert mini.run().code == 0
    return mini


def test_ls_says_what_there_is_and_who_uses_it(two, command):
    said = command("ls", "--keep", "0")
    assert (said.count("toy"), said.count("nothing")) == (3, 3) and "6 in all" in said
    items = json.loads(command("ls", "--json", "--keep", "1"))["items"]
    assert {item["kind"] for item in items} == {"artifact"}
    assert sorted(map(tuple, (item["used_by"] for item in items))) == [()] * 3 + [("a recent run", "toy")] * 3


def test_gc_lists_and_removes_only_with_yes(two, command):
    before = lying(two)
    assert "3 to be removed with --yes" in command("gc", "--keep", "1") and lying(two) == before
    assert "3 removed" in command("gc", "--keep", "1", "--yes") and len(lying(two)) == 3
    assert set(two.states().values()) == {"cached"}
    assert "0 removed" in command("gc", "--keep", "1", "--yes")
    assert not list(two.home.glob("store/tmp/*"))


def test_the_last_runs_of_each_recipe_keep_theirs(two):
    assert (len(unused(two, 0)), len(unused(two, 1)), len(unused(two, 2))) == (3, 3, 0)


def test_what_a_run_used_and_did_not_make_is_kept(two):
    toy.edit(two.recipe, "steps: 3", "steps: 4")
    assert two.run().ran == ("slow",)
    toy.edit(two.recipe, "times: 2", "times: 3")  # now no recipe needs any of them
    assert sorted(item.name.partition("/")[0] for item in unused(two, 1)) == [
        "count",
        "slow",
        "slow",
        "words",
    ]


def test_what_turned_out_to_be_built_in_a_run_is_kept(two):
    shutil.rmtree(stage_folder(two, "words"))
    assert two.run().ran == ("words",)  # its plan knew no key of the others
    toy.edit(two.recipe, "times: 2", "times: 3")
    assert len(unused(two, 1)) == 3


def stage_folder(mini, name):
    return next(s.artifact.folder for s in mini.plan().stages if s.name == name)


def test_what_is_served_is_kept_with_all_that_it_was_made_from(two):
    old = next(item for item in unused(two) if item.name.startswith("slow"))
    (two.home / "serving.json").write_text(json.dumps({"any": [{"folder": str(old.path)}], "pid": 3}))
    assert unused(two) == []
    (two.home / "serving.json").write_text("torn {")
    assert len(unused(two)) == 3


def test_a_recipe_that_cannot_be_read_keeps_all_that_has_its_name(two, command):
    text = two.recipe.read_text()
    (two.recipe.parent / "other.yaml").write_text("name: other\nabout: x\nstages: {words: {}, count: {}}\n")
    assert len(unused(two)) == 3
    two.recipe.rename(two.recipe.with_name("theirs.yaml"))
    two.recipe.with_name("theirs.yaml").write_text(text.replace("seed: 3", "sed: 3"))
    two.recipe.write_text(text.replace("name: toy", "name: mine"))
    items, findings = space.items(two.context(), Local(two.repo, two.home), 0)
    assert not [item for item in items if not item.users]
    assert [f.subject for f in findings] == ["other.yaml", "theirs.yaml"]


def test_a_recipe_for_a_gpu_that_is_not_seen_keeps_all_of_its_own(two, monkeypatch):
    toy.edit(two.recipe, "seed: 3", "seed: 3\ngpu: cuda")
    monkeypatch.setattr(space.preflight, "gpu_architecture", lambda: None)
    assert unused(two) == []


def test_variants_and_the_other_executor_are_needed_too(two):
    toy.edit(two.recipe, "seed: 3", "seed: 3\nvariants: {quiet: {words: {times: 1}}}")
    assert unused(two) == []


def test_scratch_of_a_stage_that_would_go_on_is_kept(two):
    toy.edit(two.recipe, "steps: 3", "steps: 4\n    how: badly")
    assert two.run().code == 1
    assert lying(two, "scratch") and not [item for item in unused(two) if item.kind == "scratch"]
    toy.edit(two.recipe, "how: badly", "how: crash")
    assert [item.kind for item in unused(two)].count("scratch") == 1
    assert [item.kind for item in unused(two, 1)].count("scratch") == 0


def test_environments_of_no_recipe_go_and_those_of_others_stay(two):
    image = two.context().recipe.images["plain"]
    executor = Local(two.repo, two.home)
    for name in ("plain-0123456789ab", executor.environment(image).name, "pytest-python3.11"):
        (two.home / "envs" / name).mkdir(parents=True)
        (two.home / "envs" / name / ".ready").touch()
    gone, _ = space.remove(two.context(), executor, 3)
    assert [item.name for item in gone] == ["plain-0123456789ab"]
    assert len(list((two.home / "envs").iterdir())) == 2


@pytest.mark.parametrize("moment", ["rename", "remove"])
def test_a_crash_in_the_middle_leaves_artifacts_whole_or_gone(two, moment):
    code = "\n".join(
        [
            "import sys; sys.path[:0] = sys.argv[2:]",
            "from pathlib import Path",
            "import os, signal, toy",
            "from forge import space",
            "from forge.executor.local import Local",
            "mini = toy.Toy.__new__(toy.Toy)",
            "mini.repo, mini.home = Path(sys.argv[1]) / 'repo', Path(sys.argv[1]) / 'home'",
            "mini.recipe = mini.repo / 'recipes' / 'toy.yaml'",
            "real, calls = os.rename, []",
            "def rename(*paths):",
            "    calls.append(paths)",
            f"    if {moment == 'rename'} and len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)",
            "    return real(*paths)",
            "def remove(path):",
            "    next(p for p in path.rglob('*') if p.is_file()).unlink()",
            "    os.kill(os.getpid(), signal.SIGKILL)",
            "space.os.rename = rename",
            f"if {moment == 'remove'}: space.store.remove = remove",
            "space.remove(mini.context(), Local(mini.repo, mini.home), 0)",
        ]
    )
    words = [sys.executable, "-c", code, str(two.home.parent), str(toy.REPO), str(Path(__file__).parent)]
    assert subprocess.run(words).returncode == -signal.SIGKILL
    context = two.context()
    for folder in two.home.glob("store/artifacts/*/*"):
        artifact = context.store.at(folder.parent.name, folder.name)
        assert artifact and context.store.damage(artifact) == ""
    assert len(lying(two)) == 5 and set(two.states().values()) == {"cached"}
    assert len(space.remove(two.context(), Local(two.repo, two.home), 0)[0]) == 2
    assert not list(two.home.glob("store/tmp/*"))


def test_gc_waits_for_no_run(two, command):
    from forge import lock

    with lock.held(two.home / "store/lock", False, print):
        assert "found a lock that is held by process" in command("gc", "--yes", code=1)
        command("gc")


BASE = "python:3.11-slim-bookworm"
TEST = f"annie/test-{uuid.uuid4().hex[:8]}"  # tags of this run of the tests alone: others may use the engine
engine = pytest.mark.skipif(not answers(), reason="no Docker engine answers here")


@pytest.fixture
def images(mini, monkeypatch):
    """`images.make(tag, latest=False, **labels)` makes a real image, `images.run(tag)` a container of it, and
    `images.there()` says which tags there are. With labels of its own: gc removes what has forge's, and the
    engine may hold images that somebody needs.
    """
    labels = {name: f"{TEST}.{name}" for name in ("environment", "key")}
    (mini.repo / "images/plain/note.txt").write_text(TEST)  # its tag is this run's own too
    monkeypatch.setattr(kept, "ENVIRONMENT", labels["environment"])
    monkeypatch.setattr(kept, "KEY", labels["key"])
    executor = Docker(mini.repo, mini.home)
    dockerfile = mini.home.parent / "Dockerfile"
    dockerfile.write_text(f"FROM {BASE}\nARG CONTENT\nENV CONTENT=$CONTENT\n")
    (empty := mini.home.parent / "empty").mkdir()
    containers = []

    def shown():
        filters = [{"label": label} for label in labels.values()]
        return [image for each in filters for image in executor.client.images.list(filters=each)]

    def make(tag, latest=False, content="", **given):
        arguments, named = {"CONTENT": content or tag}, {labels[key]: value for key, value in given.items()}
        executor._build(dockerfile, tag, empty, {}, arguments, named, lambda line: None)
        if latest:
            executor.client.images.get(tag).tag(tag.partition(":")[0], "latest")

    def run(tag):
        containers.append(executor.client.containers.run(tag, ["sleep", "300"], detach=True))
        return containers[-1].name

    yield SimpleNamespace(
        executor=executor, make=make, run=run, there=lambda: {tag for image in shown() for tag in image.tags}
    )
    for container in containers:
        container.remove(force=True)
    for image in shown():
        executor.client.images.remove(image.id, force=True)


def of_images(items):
    return {item.name for item in items if item.kind == "image"}


@engine
def test_images_of_no_recipe_and_no_artifact_go(images, two):
    context, executor = two.context(), images.executor
    (built,) = [s.artifact for s in two.plan().stages if s.name == "slow"]
    environment = executor.tag(context.recipe.images["plain"])
    images.make(environment, environment="plain")
    images.make(f"{TEST}-env:old", environment="plain")
    images.make(f"{TEST}-product:1", latest=True, key="0" * 64)
    images.make(f"{TEST}-product:2", key=built.key)
    images.make(f"{TEST}-busy:1", latest=True, environment="x")
    images.make(f"{TEST}-theirs:1")
    name = images.run(f"{TEST}-busy:1")
    try:
        gone, findings = space.remove(context, executor, 3)
        stranger = executor.client.images.get(f"{TEST}-theirs:1")
    finally:
        executor.client.images.remove(f"{TEST}-theirs:1")
    assert of_images(gone) == {f"{TEST}-env:old", f"{TEST}-product:1"} and stranger
    assert images.there() == {
        environment,
        f"{TEST}-product:2",
        f"{TEST}-busy:1",  # with both tags: without the first nothing would find it again
        f"{TEST}-busy:latest",
    }
    assert [(f.subject, name in f.found, f"docker rm --force {name}" in f.remedy) for f in findings] == [
        (f"{TEST}-busy:1", True, True)
    ]


@engine
def test_an_image_is_as_old_as_its_tag_here_and_as_large_as_docker_says(images, two):
    """Builds have no date of their own, so that equal files give equal images."""
    images.make(f"{TEST}-env:1", latest=True, environment="x")
    (item,) = [item for item in space.items(two.context(), images.executor, 0)[0] if item.kind == "image"]
    assert abs(datetime.datetime.now(datetime.UTC) - item.created) < datetime.timedelta(minutes=10)
    assert item.bytes > 1e8 and item.users == ()


@engine
def test_images_that_the_last_runs_started_stay_for_their_scripts(images, two):
    images.make(f"{TEST}-words:1", environment="x")
    newest = max(two.home.glob("runs/*"))
    (newest / "01-words.sh").write_text(f"exec docker run --rm {TEST}-words:1 /job.json\n")
    (newest / "02-odd.sh").mkdir()
    for keep, gone in ((1, set()), (0, {f"{TEST}-words:1"})):
        assert of_images(space.remove(two.context(), images.executor, keep)[0]) == gone


@engine
def test_an_image_without_a_tag_of_its_own_is_found_and_removed(images, two):
    """Another took its tag; or its own was removed by hand, and `latest` is left."""
    client = images.executor.client
    images.make(f"{TEST}-product:1", content="one", key="1")
    replaced = client.images.get(f"{TEST}-product:1").id
    images.make(f"{TEST}-other:1", content="two", key="2")
    client.images.get(f"{TEST}-other:1").tag(f"{TEST}-product", "1")
    images.make(f"{TEST}-env:1", latest=True, environment="x")
    client.images.remove(f"{TEST}-env:1")
    gone, findings = space.remove(two.context(), images.executor, 3)
    names = {replaced[:19], f"{TEST}-product:1", f"{TEST}-other:1", f"{TEST}-env:latest"}
    assert (of_images(gone), findings, images.there()) == (names, [], set())


@engine
def test_an_image_that_is_removed_by_hand_breaks_neither_ls_nor_gc(images, two, monkeypatch):
    client = images.executor.client
    for number in range(2):
        images.make(f"{TEST}-env:{number}", environment="x")
    client.images.remove(f"{TEST}-env:0")
    assert of_images(space.items(two.context(), images.executor, 0)[0]) == {f"{TEST}-env:1"}
    real = client.api.images

    def images_of_before(**options):
        """As if it were removed right after it was listed."""
        listed = real(**options)
        if listed:
            client.images.remove(f"{TEST}-env:1")
            monkeypatch.setattr(client.api, "images", real)
        return listed

    monkeypatch.setattr(client.api, "images", images_of_before)
    gone, findings = space.remove(two.context(), images.executor, 0)
    assert (of_images(gone), findings) == ({f"{TEST}-env:1"}, [])


@engine
def test_an_image_that_a_container_took_in_that_moment_is_kept_by_the_engine(images, two, monkeypatch):
    images.make(f"{TEST}-env:1", environment="x")
    images.run(f"{TEST}-env:1")
    monkeypatch.setattr(images.executor.client.api, "containers", lambda **options: [])
    gone, findings = space.remove(two.context(), images.executor, 0)
    assert not of_images(gone) and [f.subject for f in findings] == [f"{TEST}-env:1"]
    assert images.there() == {f"{TEST}-env:1"}
