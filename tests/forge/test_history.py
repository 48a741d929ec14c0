"""What `build.py runs` says of earlier runs, and `logs --run` of one of them."""

from __future__ import annotations

import json
import shutil

import pytest
import toy

from forge import history, journal
from forge.mask import Mask
from forge.store import Store


@pytest.fixture
def past(mini):
    return lambda: list(history.of_recipe(Store(mini.home), "toy"))


def test_each_run_says_what_it_made_and_why_and_how_it_ended(mini, past):
    assert mini.run().code == 0
    toy.edit(mini.repo / "recipes/toy.yaml", "upper: false", "upper: true")
    assert mini.run().code == 0
    assert mini.run().code == 0  # makes nothing, and leaves no folder
    toy.edit(mini.repo / "stages/count/__main__.py", "job.metric", "raise SystemExit(3)\n    job.metric")
    assert mini.run().code == 1
    failed, second, first = past()
    assert [run.ending for run in (first, second)] == ["done", "done"]
    assert first.made == ("words", "count", "slow") and first.why == "never built"
    assert second.why == "the parameter upper changed: false -> true"
    assert failed.ending == "failed in count" and failed.made == ()
    assert first.seconds > 0 and first.executor == "local" and first.bytes > 0 and not first.gone
    assert first.name < second.name and first.began <= second.began


def test_what_was_removed_is_said(mini, past):
    assert mini.run().code == 0
    shutil.rmtree(Store(mini.home).at("count", past()[0].keys["count"]).folder)
    assert past()[0].gone == ("count",)


def test_a_run_without_an_ending_is_under_way_while_its_process_lives_or_was_cut_off(mini, past):
    run = journal.Journal(mini.home, "toy", Mask(()), lambda event: None)
    assert past()[0].ending == "under way" and past()[0].seconds is None and not past()[0].resume
    run.plan({"resume": "the command"})
    run.emit("stage", stage="count", why="never built", key="k")
    assert past()[0].ending == "under way" and journal.under_way(mini.home) == run.folder
    run.close()  # as the kernel does when a process ends; another process may have its number by then
    assert past()[0].ending == "cut off in count" and past()[0].resume == "the command"
    assert journal.under_way(mini.home) is None
    for content in ("[]", "{"):
        (run.folder / "plan.json").write_text(content)
        assert past()[0].ending == "cut off in count" and not past()[0].resume
    for name in ("plan.json", "events.jsonl"):
        (run.folder / name).unlink()
    assert past()[0].ending == "cut off in preparation"


def test_the_commands(mini, command):
    assert "no run yet" in command("runs")
    command("run")
    toy.edit(mini.repo / "recipes/toy.yaml", "upper: false", "upper: true")
    command("run")
    newest, first = journal.runs(mini.home, "toy")
    told = command("runs").splitlines()
    stamps = [folder.name.removesuffix("-toy") for folder in (newest, first)]
    assert [line.split()[0] for line in told[1:3]] == stamps
    assert "words to slow: never built" in told[2]
    as_json = json.loads(command("runs", "--json"))
    assert [run["name"] for run in as_json] == [newest.name, first.name]
    (first / "01-words.log").write_text("of the first\n")
    assert command("logs", "words", "--run", stamps[1]) == "of the first\n"
    assert command("logs", "words") != "of the first\n"
    refused = command("logs", "words", "--run", "2020", code=1)
    assert "no log in run 2020 of recipe toy" in refused and "build.py runs toy" in refused
