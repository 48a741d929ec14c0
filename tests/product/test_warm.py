"""build.py warm on the miniature repository, with a stage train whose kernels are made up."""

from __future__ import annotations

import json
import textwrap
from dataclasses import replace

import pytest
import toy
from click.testing import CliRunner

import build
from forge import journal
from forge.executor.local import Local
from forge.finding import Refused
from product import warm

TRAIN = """\
    summary = "training"
    image = "plain"
    produces = "text"
    apart = ["warm.py"]
    [consumes]
    count = "text"
    words = "text"
    [parameters.rank]
    type = "int"
    default = 16
    doc = "rank"
    [needs]
    gpu = true
    """
WARM = """\
    import json, os, pathlib
    from stages import job

    def run(task):
        folder = pathlib.Path(os.environ["ANNIE_KERNELS"])
        there = len(list(folder.iterdir()))
        (folder / "kernel").write_text("x" * 1000)
        job.progress(1, None, "kernels", "compiled scan")
        job.metric("kernels compiled", 1 - there)
        if task.params["rank"] == 13:
            raise job.StageError("a bad rank", "a good one", "Take 16.")
        print("inputs", sorted(task.inputs), task.device, task.params, flush=True)
        (task.scratch / "checkpoint").mkdir()
        report = {"compiled": 1 - there, "loaded": there, "tuned": 0, "folder": "gpu", "bytes": 1000}
        report["kernels"] = {}
        (task.output / "warm.json").write_text(json.dumps(report))

    if __name__ == "__main__":
        job.main(run)
    """


class WithGpu(Local):
    """The local executor, as if its environments held a GPU's torch."""

    def check(self, wanted, gpu):
        return []


@pytest.fixture
def trained(mini):
    folder = mini.repo / "stages/train"
    folder.mkdir()
    (folder / "stage.toml").write_text(textwrap.dedent(TRAIN))
    (folder / "__main__.py").write_text("")
    (mini.repo / "stages/train/warm.py").write_text(textwrap.dedent(WARM))
    toy.edit(mini.recipe, "seed: 3", "seed: 3\ngpu: cuda")
    with mini.recipe.open("a") as recipe:
        recipe.write("  train: {}\n")
    return mini


def warmed(its, executor=None, gpu="sm_121"):
    its.events.clear()
    context = replace(its.context(), gpu=gpu)
    return warm.warm(context, executor or WithGpu(its.repo, its.home), its.events.append)


def test_what_is_compiled_once_is_there_the_second_time(trained):
    made = warmed(trained)
    assert (made["compiled"], made["tuned"], made["bytes"]) == (1, 0, 1000)
    again = warmed(trained)
    assert (again["compiled"], again["loaded"], again["folder"]) == (0, 1, made["folder"])
    assert [e["event"] for e in trained.events if e["event"] not in ("log", "metric")] == [
        "plan",
        "stage",
        "progress",
        "stage_done",
        "done",
    ]
    assert made["folder"].startswith(str(trained.home / "kernels/plain-"))


def test_it_takes_the_recipes_parameters_and_what_is_built(trained):

    def said():
        lines = (event.get("line", "") for event in trained.events)
        return next(line for line in lines if line.startswith("inputs"))

    warmed(trained)
    assert said() == "inputs [] cuda {'rank': 16}"
    trained.run(last="count")
    warmed(trained)
    assert said() == "inputs ['count', 'words'] cuda {'rank': 16}"


def test_it_leaves_no_artifact_no_scratch_and_no_run_of_the_recipe(trained):
    before = trained.states()
    warmed(trained)
    store = trained.home / "store"
    assert (
        trained.states() == before
        and not list(store.glob("tmp/*"))
        and not list(store.glob("scratch/*/*"))
        and not (store / "artifacts").exists()
    )
    assert journal.runs(trained.home, "toy") == [] and len(journal.runs(trained.home, "toy.warm")) == 1


def test_it_enters_no_key(trained):
    before = {stage.name: stage.key.components for stage in trained.plan().stages}
    warmed(trained)
    with (trained.repo / "stages/train/warm.py").open("a") as code:
        code.write("# changed\n")
    assert {stage.name: stage.key.components for stage in trained.plan().stages} == before


def test_a_failure_is_told_with_its_remedy(trained):
    toy.edit(trained.recipe, "train: {}", "train: {rank: 13}")
    assert warmed(trained) is None
    failed = trained.event("failed")
    assert (failed["found"], failed["remedy"]) == ("a bad rank", "Take 16.") and failed["log"].endswith(
        "01-warm.log"
    )


def test_where_nothing_would_be_compiled_it_is_refused_with_a_way_out(trained):
    def refused(**given):
        with pytest.raises(Refused) as caught:
            warmed(trained, **given)
        return " ".join(str(f) for f in caught.value.findings)

    assert "Run with --executor docker" in refused(executor=Local(trained.repo, trained.home))
    assert "no GPU that nvidia-smi can see" in refused(gpu="none")
    toy.edit(trained.recipe, "gpu: cuda", "gpu: none")
    assert "which trains without a GPU" in refused()
    toy.edit(trained.recipe, "  train: {}\n", "")
    assert "no stage train in recipe" in refused()
    assert not (trained.home / "kernels").exists()


def test_the_command(trained, monkeypatch):
    from forge import executor as executors
    from forge import preflight

    monkeypatch.setattr(build, "REPO", trained.repo)
    monkeypatch.setenv("ANNIE_HOME", str(trained.home))
    call = lambda *words: CliRunner().invoke(
        build.cli, ["warm", "--recipe", "toy", "--executor", "local", *words]
    )
    monkeypatch.setattr(preflight, "gpu_architecture", lambda: None)
    result = call()
    assert (
        result.exit_code == 1
        and "Run with --executor docker" in result.output
        and "Traceback" not in result.output
    )
    monkeypatch.setattr(preflight, "gpu_architecture", lambda: "sm_121")
    monkeypatch.setattr(executors, "make", lambda name, repo, home: WithGpu(repo, home))
    assert "1 kernels compiled, 0 tuned, 0 compiled before; 1.0 kB in" in call().output
    assert json.loads(call("--json").output.splitlines()[-1])["compiled"] == 0
