"""What takes space, and what `gc` removes: nothing that a recipe, a server or a recent run needs."""

from __future__ import annotations

import datetime
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy
from docker.errors import APIError

from forge import space
from forge.executor.docker import Docker
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
        assert "the lock is held" in command("gc", "--yes", code=1)
        command("gc")


class Engine:
    """Images as docker's client shows them; the one called `busy` runs in a container."""

    def __init__(self, *images):
        self.all = {image.id: image for image in images}
        self.images, self.removed = self, []

    def list(self, filters):
        return [image for image in self.all.values() if filters["label"] in image.labels]

    def get(self, tag):
        return next(image for image in self.all.values() if tag in image.tags)

    def remove(self, tag):
        if "busy" in tag:
            response = SimpleNamespace(status_code=409, reason="conflict", url="")
            raise APIError("conflict", response, "a container uses it")
        self.removed.append(tag)


def image(number, tags, **labels):
    return SimpleNamespace(
        id=str(number),
        tags=tags,
        labels={f"io.annie.{name}": value for name, value in labels.items()},
        attrs={"Size": 1000, "Created": "2026-01-01T00:00:00.123456789Z"},
    )


def test_images_of_no_recipe_and_no_artifact_go(two):
    executor = Docker(two.repo, two.home)
    context = two.context()
    (kept,) = [s.artifact for s in two.plan().stages if s.name == "slow"]
    environment = executor.tag(context.recipe.images["plain"])
    executor._client = engine = Engine(
        image(1, [environment], environment="plain"),
        image(2, ["annie/env-plain:old"], environment="plain"),
        image(3, ["annie/toy:1", "annie/toy:latest"], key="0" * 64),
        image(4, ["annie/toy:2"], key=kept.key),
        image(5, ["annie/busy:1"], stage="words", environment="x"),
        image(6, ["somebody/else:1"], theirs="x"),
    )
    gone, findings = space.remove(context, executor, 3)
    assert engine.removed == ["annie/env-plain:old", "annie/toy:1", "annie/toy:latest"]
    assert [item.name for item in gone if item.kind == "image"] == ["annie/env-plain:old", "annie/toy:1"]
    assert [(f.subject, f.found) for f in findings] == [("annie/busy:1", "a container uses it")]
    assert {item.created for item in gone if item.kind == "image"} == {
        datetime.datetime(2026, 1, 1, 0, 0, 0, 123456, tzinfo=datetime.UTC)
    }
