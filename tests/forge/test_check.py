"""A stage's own check of its sources, before anything runs."""

from __future__ import annotations

import json
import shutil

import pytest
import toy

from forge import check, run
from forge.finding import Refused
from forge.parameter import MISSING

CHECK = """\
from stages import check
from stages.check import Finding

def look(task):
    for path in task.sources["files"]:
        if path.is_file() and "bad" in path.read_text():
            yield Finding(f"{path.name}:1", "a bad word", "good words", "Mend it.")
        if path.is_file() and "odd" in path.read_text():
            yield Finding(path.name, "an odd word", "even words", "", "warning")

if __name__ == "__main__":
    check.main(look)
"""


@pytest.fixture
def checked(mini):
    shutil.copy(toy.REPO / "stages" / "check.py", mini.repo / "stages" / "check.py")
    (mini.repo / "stages/words/sources.py").write_text(CHECK)
    toy.edit(
        mini.repo / "stages/words/stage.toml",
        'produces = "text"',
        'produces = "text"\ncheck = "stages.words.sources"',
    )
    return mini


def test_plan_run_and_doctor_name_the_file_and_line(checked, command):
    (checked.repo / "data/a.txt").write_text("bad\n")
    for word in ("plan", "run", "doctor"):
        text = command(word, code=1)
        assert "a.txt:1: found a bad word; expected good words" in text and "Mend it." in text
    assert json.loads(command("plan", "--json", code=1))["findings"][0]["subject"] == "a.txt:1"
    assert not list(checked.home.glob("store/artifacts/*"))


def test_a_warning_stops_nothing(checked, command):
    (checked.repo / "data/a.txt").write_text("odd\n")
    assert "a.txt: found an odd word" in command("plan")
    assert "ran words, count, slow" in command("run")


def test_what_is_built_or_not_selected_is_not_checked_again(checked, monkeypatch):
    assert checked.run().code == 0
    monkeypatch.setattr(check.subprocess, "run", lambda *a, **k: pytest.fail("a check was started"))
    assert checked.run().code == 0 and check.findings(checked.context(), checked.plan()) == []
    toy.edit(checked.recipe, "upper: false", "upper: true")
    check.findings(checked.context(), checked.plan(only=("slow",)))


def test_a_check_gets_the_recipes_files_and_parameters_and_those_of_its_inputs(checked):
    recipe = checked.context().recipe
    given = check.described(recipe, recipe.stages["count"])
    words = {
        "stage": "words",
        "device": "cpu",
        "params": {"upper": False, "times": 1},
        "sources": {"files": [str(checked.repo / "data/a.txt"), str(checked.repo / "data/b")]},
    }
    assert given == {
        "stage": "count",
        "device": "cpu",
        "params": {},
        "sources": {},
        "inputs": {"words": words},
    }


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise RuntimeError('oh')", "exit status 1: RuntimeError: oh"),
        ("print('hello')", "an answer that is no finding"),
        ('print(\'{"level": "error"}\')', "an answer that is no finding"),
        ("print('{}')", "an answer that is no finding"),
        (
            (
                "import json; print(json.dumps(dict(level='fatal', subject='', found='', expected='',"
                " remedy='')))"
            ),
            "the level 'fatal'",
        ),
        ("import yaml", "No module named 'yaml'"),
        ("import time; time.sleep(9)", "no end after 1 s"),
    ],
)
def test_a_check_that_fails_is_itself_a_finding(checked, monkeypatch, code, said):
    monkeypatch.setattr(check, "SECONDS", 1)
    (checked.repo / "stages/words/sources.py").write_text(code + "\n")
    (found,) = check.findings(checked.context(), checked.plan())
    assert found.level == "error" and said in found.found and "stages.words.sources" in found.found


def test_a_check_is_a_module_of_its_own_stage(checked):
    toy.edit(checked.repo / "stages/words/stage.toml", "stages.words.sources", "stages.count.sources")
    with pytest.raises(Refused, match="check = 'stages.count.sources'; expected a module of this stage"):
        checked.plan()


@pytest.mark.parametrize("recipe", ["tiny", "annie"])
def test_the_recipes_of_this_repository_pass_their_checks(recipe, tmp_path):
    from forge import plan
    from forge import recipe as recipes
    from forge.store import Store

    context = plan.Context(
        recipes.load(recipes.find(recipe, toy.REPO), toy.REPO), Store(tmp_path), toy.REPO, "local"
    )
    (note,) = check.findings(context, plan.make(context))
    assert (note.level, str(note.subject)) == ("note", "evaluate.kv_cache") and note.found.startswith(
        "BF16 for the quantised model, since "
    )
    gates = context.recipe.stages["evaluate"].params["gate"]
    assert (
        gates["tuned"]["above"] == "base"
        and gates["tuned"]["at_least"] >= 0.8
        and gates["nvfp4"] == {"within": 0.02, "of": "tuned"}
    )


def test_every_image_stage_is_checked_for_a_gate(tmp_path):
    from test_parameter import written

    from forge import plan
    from forge import recipe as recipes
    from forge.store import Store

    path = written(tmp_path, lambda stages: stages["evaluate"].pop("gate"))
    context = plan.Context(recipes.load(path, toy.REPO), Store(tmp_path), toy.REPO, "local")
    assert [str(f.subject) for f in check.findings(context, plan.make(context)) if f.level == "error"] == [
        "evaluate.gate"
    ]
    assert [
        f.level for f in check.findings(context, plan.make(context, plan.Selection(last="evaluate")))
    ] == ["note"]
    assert (
        context.recipe.stages["evaluate"].contract.parameters["gate"].default is not MISSING
        and run.check is check
    )
