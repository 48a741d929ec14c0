"""The commands of build.py, on the miniature repository."""

from __future__ import annotations

import json

import pytest
import toy
from click.testing import CliRunner

import build
from forge import VERSION, executor
from forge.executors import EXECUTORS
from forge.finding import Refused


def test_the_version_is_one_that_the_changelog_knows():
    said = CliRunner().invoke(build.cli, ["--version"]).output.split()
    assert said == ["annie", VERSION] and f"## {VERSION}" in (build.REPO / "CHANGELOG.md").read_text()


def test_plan_then_run_then_nothing_to_do(mini, command):
    assert "3 of 3 to run" in command("plan")
    assert [s["state"] for s in json.loads(command("plan", "--json"))["stages"]] == ["run", "waits", "waits"]
    text = command("run")
    assert "ran words, count, slow" in text and "slow: done" in text
    assert "nothing to do: 3 stages are built" in command("run")
    assert "everything is built" in command("plan")


def test_run_as_json_lines(mini, command):
    events = [json.loads(line) for line in command("run", "--json").splitlines()]
    kinds = [e["event"] for e in events]
    assert (
        kinds[0] == "plan" and kinds[-1] == "done" and kinds.count("stage_done") == 3 and "progress" in kinds
    )
    assert {"event": "metric", "name": "count", "value": 3, "step": None}.items() <= next(
        e for e in events if e["event"] == "metric"
    ).items()


def test_path_prints_a_folder_and_nothing_else(mini, command):
    assert "python build.py run --recipe toy --executor local --until count" in command(
        "path", "count", code=1
    ).replace("\n", "")
    command("run")
    assert command("path", "count") == f"{mini.plan().stages[1].artifact.folder}\n"


def test_explain_in_words_and_as_json(mini, command):
    command("run")
    toy.edit(mini.recipe, "upper: false", "upper: true")
    assert "the parameter upper changed: false -> true" in command("explain", "words")
    change = json.loads(command("explain", "words", "--json"))["changes"]
    assert change == [
        {
            "component": "param/upper",
            "old": "false",
            "new": "true",
            "phrase": "the parameter upper changed: false -> true",
            "details": [],
        }
    ]
    assert "slow: cached" not in command("explain", "slow")


def test_status_and_logs(mini, command):
    assert command("status").count("never") == 3
    command("run")
    assert json.loads(command("status", "--json"))["running"] is None
    assert command("status").count("cached") == 3
    assert "count = 3" in command("logs", "count")
    for folder in (mini.home / "runs").iterdir():
        (folder / "02-count.log").rename(folder / "00-count.log")  # what an image of that name would leave
    assert "no log under recipe toy" in command("logs", "count", code=1)
    assert "Did you mean count?" in command("logs", "cuont", code=1)


def test_a_failed_run_ends_with_1_and_says_why(mini, command):
    toy.edit(mini.recipe, "steps: 3", "steps: 3\n    how: badly")
    text = command("run", code=1)
    for word in (
        "slow failed",
        "found    a bad thing",
        "expected a good thing",
        "remedy   Make it good.",
        "03-slow.log",
    ):
        assert word in text
    assert "the last run failed in slow: a bad thing" in command("status")


def test_bad_input_ends_with_1_and_no_traceback(mini, command):
    toy.edit(mini.recipe, "upper: false", "uper: false")
    text = command("run", code=1)
    assert "toy.yaml:7" in text and "Did you mean upper?" in text and "Traceback" not in text
    assert "Did you mean toy?" in CliRunner().invoke(build.cli, ["plan", "--recipe", "tooy"]).output


def test_a_command_about_a_recipe_takes_it_as_an_argument(mini, command, monkeypatch):
    def said(*words, code=0):
        result = CliRunner().invoke(build.cli, [*words, "--executor", "local"])
        assert result.exit_code == code, result.output
        return result.output

    monkeypatch.chdir(mini.repo)
    monkeypatch.setenv("ANNIE_RECIPE", "nothing")
    for name in ("plan", "status", "runs"):
        assert said(name, "toy", "--json") == said(name, "--recipe", "toy", "--json")
        assert said(name, "toy", "--recipe", "toy")
    assert "no recipe nothing" in said("plan", code=1)
    assert "two recipes, toy and --recipe tooy; name one" in said("plan", "toy", "--recipe", "tooy", code=2)
    shown = {name for name, its in build.cli.commands.items() if "named" in [p.name for p in its.params]}
    assert {"plan", "run", "demo", "warm", "compare", "status", "runs", "ls", "gc", "doctor"} <= shown
    assert not {"verify", "explain", "logs", "path", "audit", "chat"} & shown


@pytest.fixture
def plain(mini, command):
    """`plain(*words, code=0)` runs a command without --recipe and --executor; stdout and stderr."""

    def call(*words, code=0):
        result = CliRunner().invoke(build.cli, words)
        assert result.exit_code == code, result.output
        return result.stdout, result.stderr

    return call


def beside(mini, name):
    """Another recipe, in a folder of its own."""
    folder = mini.repo.parent / name
    folder.mkdir()
    text = mini.recipe.read_text().replace("../data", f"{mini.repo}/data").replace("seed: 3", "seed: 4")
    (folder / "recipe.yaml").write_text(text.replace("name: toy", f"name: {name}"))
    return folder


def test_before_any_run_the_recipe_is_the_default_one(mini, plain, monkeypatch):
    monkeypatch.setattr(build, "DEFAULT", "toy")
    out, err = plain("status", "--executor", "local")
    assert out.count("never") == 3 and not err


def test_commands_speak_of_what_was_run_last(mini, plain, command):
    command("run")
    out, err = plain("status")
    assert out.count("cached") == 3 and err == "as in the last run: recipe toy, executor local\n"
    assert json.loads(plain("plan", "--json")[0])["executor"] == "local" and not plain("plan", "--json")[1]
    assert plain("path", "count") == (command("path", "count"), "")
    own = beside(mini, "signe")
    plain("run", str(own), "--executor", "local")
    assert f"recipe {own}, executor local" in plain("plan")[1].replace("\n", "")
    assert plain("path", "count")[0] != command("path", "count")
    assert plain("status", "toy")[1] == "as in the last run: executor local\n"
    assert plain("status", "toy", "--executor", "local")[1] == ""
    assert plain("logs", "count")[0] and len(plain("runs")[0].splitlines()) == len(
        plain("runs", "toy")[0].splitlines()
    )
    command("run")  # nothing to do, and yet the last run
    assert "recipe toy" in plain("status")[1]


def test_a_run_that_was_refused_is_not_the_last_one(mini, plain, command):
    command("run")
    own = beside(mini, "signe")
    toy.edit(own / "recipe.yaml", "{minutes: 0.5}", "{minutes: 0.5, memory_gb: 90000}")
    plain("run", str(own), "--executor", "local", code=1)
    assert "recipe toy" in plain("status")[1]


def test_the_recipe_of_the_last_run_may_be_gone(mini, plain, command):
    own = beside(mini, "signe")
    plain("run", str(own), "--executor", "local")
    (own / "recipe.yaml").unlink()
    _, err = plain("plan", code=1)
    whole = " ".join(err.split())
    assert f"found no file {own}/recipe.yaml, the recipe of the last run" in whole.replace("- ", "-")
    assert "--recipe RECIPE. In recipes/ there are: toy." in whole
    command("run")
    assert "recipe toy" in plain("status")[1] and "signe" not in (mini.home / "last-runs.json").read_text()


def test_the_last_run_outlives_a_move_of_the_clone(mini, plain, command, monkeypatch):
    command("run")
    moved = mini.repo.rename(mini.repo.with_name("moved"))
    monkeypatch.setattr(build, "REPO", moved)
    assert plain("status")[0].count("cached") == 3


def test_a_damaged_list_of_last_runs_is_named(mini, plain, command):
    for text in ("", "{", "3", '{"recipe": "toy"}', '[{"recipe": "toy"}]', "[" * 100_000):
        mini.home.mkdir(exist_ok=True)
        (mini.home / "last-runs.json").write_text(text)
        assert "Remove it: rm" in plain("status", code=1)[1]


def test_doctor_names_what_is_missing(mini, command):
    assert "has what it takes" in command("doctor")
    toy.edit(mini.recipe, "minutes: 0.5", "memory_gb: 90000")
    assert "90000 GB" in command("doctor", code=1)


def test_a_plan_that_cannot_run_does_not_say_that_everything_is_built(command):
    text = command("plan", "--only", "slow")
    assert "cannot run: slow" in text and "everything is built" not in text
    assert "no stage in --from slow --until words" in command(
        "plan", "--from", "slow", "--until", "words", code=1
    )


def test_a_part_of_the_stages_is_not_everything(command):
    command("run", "--until", "count")
    for selected in (("--until", "count"), ("--only", "words"), ("--from", "count", "--until", "count")):
        text = command("plan", *selected)
        assert "nothing to run; built: " in text and "everything is built" not in text
    assert "nothing to do: 1 stage is built" in command("run", "--only", "words")
    for wrong in (("--only", "slow", "--until", "count"), ("--only", "words", "--from", "count")):
        assert "found no stage in" in command("plan", *wrong, code=1)


def test_plan_and_doctor_say_in_words_what_the_run_needs(command):
    needs = "The run takes about 0:42, 3.0 MB of disk, and at most 0.1 GB of memory at a time."
    assert needs in command("doctor")
    text = command("plan")
    assert needs in text and "~ estimated" in text
    command("run")
    assert "~" not in command("plan", "--force") and "Everything is built." in command("doctor")


def test_every_executor_of_the_table_is_made_and_may_stand_in_a_recipe(mini):
    for name in EXECUTORS:
        assert executor.make(name, mini.repo, mini.home).name == name
    assert "'docker', 'local'" in CliRunner().invoke(build.cli, ["plan", "--executor", "cloud"]).output
    with pytest.raises(Refused, match="no executor cloud; expected docker or local"):
        executor.make("cloud", mini.repo, mini.home)
    toy.edit(mini.recipe, "seed: 3", "seed: 3\nexecutor: cloud")
    with pytest.raises(Refused, match="executor = 'cloud'; expected one of docker, local"):
        mini.context()
    toy.edit(mini.recipe, "executor: cloud", "executor: docker")
    assert mini.context().recipe.executor == "docker"
