"""What a key holds, and what changes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import toy

from forge import artifact_types, code, contract, journal, plan
from forge.finding import Refused

REPO = Path(__file__).resolve().parents[2]


def names(its, stage):
    return set(plan.planned_stage(its.context(), stage).key.components)


def test_a_key_holds_what_the_stage_reaches_and_nothing_else(mini):
    mini.run(last="words")
    assert {
        "code/stages/words/__main__.py",
        "code/stages/job.py",
        "code/stages/__init__.py",
        "code/model/__init__.py",
        "code/model/spelling.py",
        "code/model/letters.py",
        "param/upper",
        "param/times",
        "source/files",
        "seed",
        "gpu",
    } <= names(mini, "words")
    assert "code/model/unused.py" not in names(mini, "words")
    assert not any(name.startswith("code/model") for name in names(mini, "count"))
    assert "input/words" in names(mini, "count")


def test_imports_are_followed_however_they_are_written(mini):
    package = mini.repo / "model" / "deep"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "a": "from .b import x\nfrom . import c\n",
        "b": "x = 1\n",
        "c": "",
        "table": "",
    }.items():
        (package / f"{name}.py").write_text(text)
    (package / "shapes.json").write_text("{}")
    (package / "b.py").write_text("TABLE = 'shapes.json'\n")
    toy.edit(
        mini.repo / "stages/count/__main__.py",
        "def run(task):",
        "def run(task):\n    import model.deep.a as deep",
    )
    reached = {str(p) for p in code.closure(mini.repo, "count")}
    assert {f"model/deep/{n}" for n in ("__init__.py", "a.py", "b.py", "c.py", "shapes.json")} <= reached
    assert "model/deep/table.py" not in reached


def test_the_files_of_a_type_are_in_no_key(mini):
    before = [stage.key for stage in mini.plan().stages]
    toy.edit(mini.repo / "stages/artifacts.toml", '"text.txt"', '"text.txt", "more.txt"')
    assert [stage.key for stage in mini.plan().stages] == before


def test_a_stage_that_imports_another_is_refused(mini):
    toy.edit(
        mini.repo / "stages/count/__main__.py",
        "from stages import job",
        "from stages import job\nimport stages.words.__main__",
    )
    with pytest.raises(Refused, match="no import of another stage"):
        code.closure(mini.repo, "count")


@pytest.mark.parametrize("package", ["forge", "product"])
def test_a_stage_that_imports_the_host_side_is_refused(mini, package):
    toy.edit(
        mini.repo / "stages/count/__main__.py",
        "from stages import job",
        f"from stages import job\nimport {package}.report",
    )
    with pytest.raises(Refused, match=f"an import of {package}.report"):
        code.closure(mini.repo, "count")


@pytest.mark.parametrize(
    ("path", "old", "new", "phrase"),
    [
        ("recipes/toy.yaml", "upper: false", "upper: true", "the parameter upper changed: false -> true"),
        ("recipes/toy.yaml", "seed: 3", "seed: 4", "the seed changed: 3 -> 4"),
        ("model/letters.py", "UPPER", "# why\nUPPER", "the code model/letters.py was edited"),
        ("data/b/c.txt", "gamma", "delta", "the source files: b/c.txt: line 1 changed"),
    ],
)
def test_explain_says_what_changed_in_one_phrase(mini, path, old, new, phrase):
    assert mini.run().code == 0
    before = mini.plan().stages[0].key.sha256
    toy.edit(mini.repo / path, old, new)
    explained = plan.explain(mini.context(), "words")
    assert explained.old == before != explained.stage.key.sha256
    assert [c.phrase.startswith(phrase) for c in explained.changes] == [True]


def test_explain_names_the_files_and_lines_of_a_source(mini):
    assert mini.run().code == 0
    toy.edit(mini.repo / "data/a.txt", "alpha beta", "alpha\nbeta\ngamma")
    (mini.repo / "data/b/c.txt").unlink()
    (mini.repo / "data/b/d.txt").write_text("delta\n")
    (change,) = plan.explain(mini.context(), "words").changes
    details = ("a.txt: line 1 changed, lines 2-3 added", "b/c.txt is gone", "b/d.txt is new")
    assert change.details == details
    assert mini.plan().stages[0].why == f"the source files: {details[0]} (and 2 more files)"


def test_an_experiment_that_was_undone_is_not_what_a_stage_is_compared_with(mini):
    assert mini.run().code == 0
    toy.edit(mini.recipe, "steps: 3", "steps: 0")
    assert mini.run().code == 0
    toy.edit(mini.recipe, "steps: 0", "steps: 3")
    toy.edit(mini.repo / "data/a.txt", "beta", "beta gamma")
    assert mini.run(last="count").code == 0
    explained = plan.explain(mini.context(), "slow")
    assert [change.phrase for change in explained.changes] == ["the input count has other content"]
    first = journal.runs(mini.home, "toy")[-1]
    assert explained.run == journal.stamp(first)


def test_of_two_artifacts_that_differ_as_little_the_last_run_decides(mini):
    assert mini.run(last="words").code == 0
    toy.edit(mini.recipe, "upper: false", "upper: false\n    times: 2")
    assert mini.run(last="words").code == 0
    toy.edit(mini.recipe, "times: 2", "times: 1")
    assert mini.run(last="count").ran == ("count",)  # it uses the first artifact of words
    toy.edit(mini.recipe, "times: 1", "times: 3")
    assert mini.plan().stages[0].why == "the parameter times changed: 1 -> 3"


def test_an_input_that_comes_out_the_same_stops_the_change(mini):
    mini.run()
    toy.edit(mini.repo / "model/letters.py", "UPPER = {}", "UPPER = dict()")
    assert mini.states() == {"words": "run", "count": "waits", "slow": "waits"}
    assert mini.run().ran == ("words",)
    assert mini.states() == dict.fromkeys(("words", "count", "slow"), "cached")


def test_going_back_finds_the_old_artifact(mini):
    mini.run()
    toy.edit(mini.recipe, "upper: false", "upper: true")
    assert mini.run().ran == ("words", "count")  # the count is the same in capitals, so slow stays
    toy.edit(mini.recipe, "upper: true", "upper: false")
    assert set(mini.states().values()) == {"cached"}


def test_a_moved_source_is_the_same_source(mini):
    mini.run()
    (mini.repo / "data" / "moved").mkdir()
    (mini.repo / "data/a.txt").rename(mini.repo / "data/moved/a.txt")
    toy.edit(mini.recipe, "data/a.txt", "data/moved/a.txt")
    assert set(mini.states().values()) == {"cached"}


def test_a_file_apart_is_in_no_key_unless_the_stage_imports_it(mini):
    folder = mini.repo / "stages/count"
    (folder / "warm.py").write_text("from model import unused\n")
    toy.edit(folder / "stage.toml", 'image = "plain"', 'image = "plain"\napart = ["warm.py"]')
    apart = {"stages/count/warm.py", "model/unused.py"}
    in_key = {f"code/{name}" for name in apart}
    assert not in_key & names(mini, "count")
    context = mini.context()
    program = plan.program(context, context.recipe.stages["count"])
    assert apart <= {str(path) for path in program.files()}
    toy.edit(folder / "__main__.py", "def run(task):", "def run(task):\n    from stages.count import warm")
    assert in_key <= names(mini, "count")


def test_a_file_apart_that_is_not_there_is_named(mini):
    toy.edit(mini.repo / "stages/count/stage.toml", 'image = "plain"', 'image = "plain"\napart = ["no.py"]')
    with pytest.raises(Refused, match="found 'no.py' in apart"):
        mini.context()


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [("images/plain/note.txt", "an image", "another"), ("recipes/toy.yaml", "base: none", "base: other")],
)
@pytest.mark.parametrize("executor", ["local", "docker"])
def test_the_image_of_a_stage_is_in_its_key(mini, path, old, new, executor):
    def key():
        return plan.planned_stage(replace(mini.context(), executor=executor), "words").key.sha256

    before = key()
    toy.edit(mini.repo / path, old, new)
    assert key() != before


def test_the_gpus_architecture_is_in_the_key_of_a_stage_that_uses_it(mini):
    toy.edit(mini.repo / "stages/count/stage.toml", "[needs]", "[needs]\ngpu = true")
    toy.edit(mini.recipe, "seed: 3", "seed: 3\ngpu: cuda")

    def gpu(stage, architecture):
        context = replace(mini.context(), gpu=architecture)
        return plan.planned_stage(context, stage).key.components["gpu"]

    assert [gpu("count", name) for name in ("sm_90", "sm_121")] == ["sm_90", "sm_121"]
    assert [gpu("words", name) for name in ("sm_90", "sm_121")] == ["none", "none"]


def test_a_stages_dockerfile_is_in_the_keys_of_containers_alone(mini):
    (mini.repo / "stages/count/Dockerfile").write_text("FROM x\n")
    in_containers = plan.planned_stage(replace(mini.context(), executor="docker"), "count").key.components
    assert "image/stages/count/Dockerfile" in in_containers
    assert not any("Dockerfile" in name for name in names(mini, "count"))


def in_key(stage):
    """Files of this repository in a stage's key."""
    return set(
        code.closure(
            REPO, stage, contract.load(REPO / "stages" / stage, artifact_types.load(REPO / "stages")).apart
        )
    )


def test_flags_of_a_server_are_in_no_key_of_what_trains():
    serving = {Path("model/families/serve.py"), Path("model/families/nemotron_h/serving.py")}
    for stage in ("base", "data", "train", "merge", "quantize"):
        assert serving.isdisjoint(in_key(stage)), stage
    for stage in ("evaluate", "package"):
        assert serving <= in_key(stage), stage


def test_what_renders_and_serves_runs_again_for_no_change_to_tensors_or_layouts():
    for stage in ("data", "evaluate", "package"):
        reached = set(map(str, in_key(stage)))
        assert not reached & {"model/families/registry.py", "model/layouts.py"}, stage
        assert "model/families/nemotron_h/names.py" not in reached, stage


def test_what_trains_has_its_whole_family_in_its_key():
    own = {path.relative_to(REPO) for path in (REPO / "model/families/nemotron_h").glob("*.py")}
    reached = in_key("train")
    for name in ("family", "names", "linears", "layout", "targets", "native", "operations"):
        assert Path(f"model/families/nemotron_h/{name}.py") in own & reached


def test_what_only_the_export_does_trains_nothing_again():
    """model/weights/nvfp4.py is in both keys: training rounds as it does."""
    export = {Path("model/weights/quant_config.py"), Path("stages/quantize/quantize.py")}
    assert export <= in_key("quantize") and export.isdisjoint(in_key("train"))
    assert Path("model/weights/nvfp4.py") in in_key("quantize") & in_key("train")
