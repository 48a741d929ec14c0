"""Power cuts: at every operation on files, whatever the disk had not been told to keep is gone."""

from __future__ import annotations

import json
import shutil
import stat
import textwrap
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import power
import pytest
import toy

from forge import hashing, journal, lock, modes, plan, run, space, store, verify
from forge.executor import docker, local
from forge.executor.engine import answers
from forge.image import Image
from forge.mask import Mask
from forge.store import Store

REPO = toy.REPO
PLACE = ((store, "_place"),)
FACTS = {"components": {"seed": "1"}, "seconds": 1.0, "recipe": "toy", "executor": "local"}
KEY = hashing.of_value(FACTS["components"])


@pytest.fixture
def home(tmp_path):
    """A home that is not there yet, in a folder that is."""
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk" / "home"


def written(whole: Store, text: str) -> Path:
    """What a stage leaves: a file at the top, one in a folder, and a checkpoint that it has synced."""
    output, scratch = whole.begin("words", KEY)
    (output / "text.txt").write_text(text)
    (output / "deep").mkdir()
    (output / "deep" / "more.txt").write_text(text * 2)
    for name in ("checkpoint", "seal"):
        (scratch / name).write_text("half way")
        modes.sync(scratch / name)
    modes.sync(scratch)
    return output


def accepted(whole: Store, output: Path) -> store.Artifact:
    return whole.accept("words", KEY, output, "text", ("text.txt",), FACTS)


def left(disk: power.Disk, tmp_path: Path) -> Iterator[tuple[power.Cut, Path]]:
    """Each cut, laid out as the folder that `disk` recorded."""
    assert len(disk.cuts) > 2
    for cut in disk.cuts.values():
        folder = cut.laid_out(tmp_path / "cut")
        yield cut, folder
        shutil.rmtree(folder)


def text_of(home: Path) -> str | None:
    """The text of the artifact that the store counts, every byte of which must be what it was."""
    whole = Store(home)
    artifact = whole.find("words", KEY)
    if artifact is None:
        assert not (whole.root / "artifacts" / "words" / KEY).exists(), "a part of an artifact"
        return None
    assert verify.read(whole, artifact, whole.readable(artifact), lambda count: None) == []
    for name in artifact.manifest["files"]:
        assert stat.S_IMODE((artifact.folder / name).stat().st_mode) == 0o400, name
    text = (artifact.folder / "text.txt").read_text()
    whole.memo.close()
    return text


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Files of a cut are new; their digests need not be remembered."""
    monkeypatch.setattr(hashing, "settle", lambda paths: None)


def test_an_artifact_or_its_scratch_is_there(home, tmp_path):
    with power.recorded(home.parent, PLACE) as disk:
        whole = Store(home)
        output = written(whole, "one")
        disk.mark()
        accepted(whole, output)
        disk.mark()
    for cut, folder in left(disk, tmp_path):
        text = text_of(folder / "home")
        scratch = folder / "home/store/scratch/words" / KEY
        names = {path.name for path in scratch.iterdir()} if scratch.is_dir() else None
        assert text in (("one",) if cut.marks == 2 else (None, "one")), cut.moment
        assert text or names or not cut.marks, cut.moment
        assert names in (None, {"checkpoint", "seal"}) or not cut.marks, cut.moment


def test_what_a_stage_synced_into_its_scratch_is_there(home, tmp_path):
    with power.recorded(home.parent) as disk:
        _, scratch = Store(home).begin("words", KEY)
        (scratch / "checkpoint").write_text("half way")
        for path in (scratch / "checkpoint", scratch):
            modes.sync(path)
        disk.mark()
    for cut, folder in left(disk, tmp_path):
        assert Store(folder / "home").unfinished("words", KEY) or not cut.marks, cut.moment


def test_one_of_two_artifacts_is_there_when_one_replaces_the_other(home, tmp_path):
    accepted(Store(home), written(Store(home), "one"))
    with power.recorded(home.parent, PLACE) as disk:
        whole = Store(home)
        accepted(whole, written(whole, "two"))
        disk.mark()
    for cut, folder in left(disk, tmp_path):
        assert text_of(folder / "home") in (("two",) if cut.marks else ("one", "two")), cut.moment


def test_without_exchange_an_artifact_is_whole_or_made_again(home, tmp_path, monkeypatch):
    """What a file system without renameat2 (NFS) does."""

    class Libc:
        def renameat2(self, *arguments: object) -> int:
            return -1

    monkeypatch.setattr(store.ctypes, "CDLL", lambda *a, **k: Libc())
    monkeypatch.setattr(store.ctypes, "get_errno", lambda: store.errno.EINVAL)
    accepted(Store(home), written(Store(home), "one"))
    with power.recorded(home.parent) as disk:
        whole = Store(home)
        accepted(whole, written(whole, "two"))
        disk.mark()
    for cut, folder in left(disk, tmp_path):
        assert text_of(folder / "home") in (("two",) if cut.marks else (None, "one", "two")), cut.moment


def test_what_is_discarded_is_whole_or_gone(home, tmp_path):
    whole = Store(home)
    artifact = accepted(whole, written(whole, "one"))
    with power.recorded(home.parent) as disk:
        whole.discard(artifact.folder)
        disk.mark()
    for cut, folder in left(disk, tmp_path):
        assert not Store(folder / "home").broken("words", KEY), cut.moment
        assert text_of(folder / "home") in ((None,) if cut.marks else (None, "one")), cut.moment
        assert not list(folder.glob(f"home/store/artifacts/words/{KEY}")) or text_of(folder / "home"), (
            cut.moment
        )


def test_a_file_that_is_written_is_the_old_one_or_the_new(home, tmp_path):
    modes.make_folder(home)
    modes.write(home / "file", "old")
    with power.recorded(home.parent) as disk:
        modes.write(home / "file", "new", executable=True)
        disk.mark()
    for cut, folder in left(disk, tmp_path):
        text, mode = (folder / "home/file").read_text(), (folder / "home/file").stat().st_mode & 0o777
        assert (text, mode) in ([] if cut.marks else [("old", 0o600)]) + [("new", 0o700)], cut.moment


def test_a_run_is_told_of_as_far_as_it_had_come(home, tmp_path):
    with power.recorded(home.parent) as disk:
        run = journal.Journal(home, "toy", Mask(()), lambda event: None)
        run.plan({"stages": [{"stage": "words", "key": KEY}]})
        disk.mark()
        run.emit("stage_done", stage="count", key="2")
        disk.mark()
        run.emit("failed", stage="slow")
        disk.mark()
        log = run.log("03-slow")
        log.line("why it failed")
        log.close()
        disk.mark()
        run.close()
    for cut, folder in left(disk, tmp_path):
        runs = journal.runs(folder / "home", "toy")
        places = journal.places(runs[0]) if runs else set()
        assert ("words", KEY) in places or cut.marks < 1, cut.moment
        assert ("count", "2") in places or cut.marks < 2, cut.moment
        ended = [(e["event"], e["stage"]) for e in (journal.events(runs[0]) if runs else [])]
        assert ("failed", "slow") in ended or cut.marks < 3, cut.moment
        logs = [path.read_text() for path in runs[0].glob("*.log")] if runs else []
        assert logs == ["why it failed\n"] or cut.marks < 4, cut.moment


def test_an_environment_that_is_marked_ready_is_whole(home, tmp_path, monkeypatch):
    """The steps are stood in for: the real ones take minutes and a network."""

    def made(command: list[str], *arguments: object, **options: object) -> None:
        if "venv" in command:
            library = Path(command[-1]) / "lib.py"
            library.parent.mkdir(parents=True)
            library.write_text("x = 1")

    monkeypatch.setattr(local, "run_logged", made)
    executor = local.Local(REPO, home)
    image = Image("train", REPO / "images/train")
    monkeypatch.setattr(executor, "_python_findings", lambda folder: [])
    modes.make_folder(home)
    with power.recorded(home.parent) as disk:
        executor.prepare(image, lambda line: None)
        disk.mark()
    for cut, folder in left(disk, tmp_path):
        ready = list(folder.glob("home/envs/*/.ready"))
        assert ready or not cut.marks, cut.moment
        assert all((path.parent / "lib.py").read_text() == "x = 1" for path in ready), cut.moment


def test_an_environment_that_gc_removes_is_whole_or_not_ready(home, tmp_path):
    environment = modes.make_folder(home / "envs" / "train-0123456789ab")
    modes.make_folder(environment / "lib")
    for name in (".ready", "lib/lib.py"):
        modes.write(environment / name, "x = 1")
    with power.recorded(home.parent) as disk:
        space._remove_folder(Store(home), "environment", environment)
    for cut, folder in left(disk, tmp_path):
        left_over = folder / "home/envs" / environment.name
        assert not (left_over / ".ready").exists() or (left_over / "lib/lib.py").exists(), cut.moment


def test_the_lock_and_the_memo_of_a_run_that_lost_its_power(home, tmp_path):
    with power.recorded(home.parent) as disk, lock.held(home / "store/lock", False, print):
        whole = Store(home)
        whole.memo.file(Path(__file__))
        disk.mark()
    for cut, folder in left(disk, tmp_path):
        path = folder / "home/store/lock"
        assert lock.holder(path) is None, cut.moment
        with lock.held(path, False, print):
            memo = Store(folder / "home").memo
            assert memo.file(Path(__file__)) == hashing.of_text(Path(__file__).read_text()), cut.moment
            memo.close()


def test_after_a_power_cut_every_command_works_and_a_run_ends(mini, command, tmp_path, monkeypatch):
    """Over one run of three stages, one of which replaces its artifact."""
    assert mini.run(last="words").code == 0
    with power.recorded(mini.home, PLACE) as disk:
        assert mini.run(force=True).code == 0
    cuts = list(disk.cuts.values())
    for number, cut in enumerate(cuts[:: -(-len(cuts) // 24)]):
        mini.home = cut.laid_out(tmp_path / "cut")
        monkeypatch.setenv("ANNIE_HOME", str(mini.home))
        for words in (("plan",), ("status",), ("ls",), ("explain", "words")):
            command(*words)
        for checkpoint in mini.home.glob("store/scratch/slow/*/done"):
            checkpoint.unlink()  # to sync its checkpoints is a stage's own matter, and this one does not
        if number % 4 == 0:
            assert mini.run().code == 0, cut.moment
            assert set(mini.states().values()) == {"cached"}, cut.moment
            assert {v["state"] for v in json.loads(command("verify", "--json"))["stages"]} == {"whole"}
        shutil.rmtree(mini.home)


BASE = "python:3.11-slim-bookworm"
PRODUCT = """\
    [build]
    image = "product"
    tag = "{tag}"
    by = "how"
    [build.contexts]
    """


@pytest.fixture
def contained(mini):
    """The miniature repository for the docker executor: stages with images, of which the last one builds a
    product from its output.
    """
    toy.edit(mini.recipe, "{base: none}", f"{{base: '{BASE}'}}")
    toy.edit(mini.recipe, "images: {", "images: {product: {base: '" + BASE + "'}, ")
    (mini.repo / "images/product").mkdir()
    (mini.repo / "images/product/Dockerfile").write_text("ARG BASE\nFROM ${BASE}\nCOPY text.txt /\n")
    product = f"annie/test-{uuid.uuid4().hex[:8]}"  # this test's own: others may use the engine
    dockerfile = (REPO / "stages/quantize/Dockerfile").read_text() + f"LABEL of={product}\n"
    for name in ("words", "count", "slow"):
        (mini.repo / "stages" / name / "Dockerfile").write_text(dockerfile.replace("quantize", name))
    contexts = "".join(f"{way} = {{}}\n" for way in ("well", "badly", "empty", "crash", "large"))
    with (mini.repo / "stages/slow/stage.toml").open("a") as contract:
        contract.write(textwrap.dedent(PRODUCT).format(tag=product) + contexts)
    yield mini
    executor, context = docker.Docker(mini.repo, mini.home), mini.context()
    programs = [plan.program(context, step) for step in context.recipe.stages.values()]
    products = [tag for image in executor.client.images.list(name=product) for tag in image.tags]
    for tag in [*map(executor.baked, programs), *products]:
        executor.remove(tag)


def run_in_containers(mini):
    executor = docker.Docker(mini.repo, mini.home)
    context = replace(mini.context(), executor="docker")
    assert run.run(context, executor, plan.Selection(), mini.events.append).code == 0, mini.events[-1]
    return context, executor


@pytest.mark.skipif(not answers(), reason="no Docker engine answers here")
def test_after_a_power_cut_what_the_docker_executor_wrote_is_whole_or_made_again(contained, tmp_path):
    """Jobs and scripts of its containers, its folders, and image.json, which names the image that the engine
    has.
    """
    with power.recorded(contained.home.parent, PLACE) as disk:
        _, executor = run_in_containers(contained)
    cuts, home = list(disk.cuts.values()), contained.home.name
    described = set()
    for number, cut in enumerate(cuts[:: -(-len(cuts) // 60)] + cuts[-1:]):
        folder = cut.laid_out(tmp_path / "cut")
        for path in folder.glob(f"{home}/runs/*/[0-9]*.json"):
            assert json.loads(path.read_text())["stage"] in path.name, cut.moment
        for path in folder.glob(f"{home}/runs/*/*.sh"):
            assert "docker run" in path.read_text() and path.stat().st_mode & 0o777 == 0o700, cut.moment
        for path in folder.glob(f"{home}/store/artifacts/slow/*/image.json"):
            image = json.loads(path.read_text())
            assert executor.client.images.get(image["tag"]).id == image["id"], cut.moment
            described.add(image["tag"])
        if number % 40 == 0:
            contained.home = folder / home
            context, _ = run_in_containers(contained)
            assert {stage.state for stage in plan.make(context).stages} == {"cached"}, cut.moment
            assert list(contained.home.glob("store/artifacts/slow/*/image.json")), cut.moment
        shutil.rmtree(folder)
    assert len(described) == 1
