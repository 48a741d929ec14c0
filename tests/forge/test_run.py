"""Runs: what they make, how they fail, and what is left when they are killed."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import threading
import time

import pytest
import toy
from rich.console import Console

from forge import journal, plan, run, screen, watch
from forge.executor.local import Local
from forge.finding import Refused
from forge.store import Store


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def test_a_run_makes_every_stage_once(mini):
    outcome = mini.run()
    assert (outcome.code, outcome.ran) == (0, ("words", "count", "slow"))
    assert (mini.text("words"), mini.text("count"), mini.text("slow")) == (
        "alpha beta gamma",
        "3",
        "went on from 0",
    )
    assert {p.name for p in outcome.folder.iterdir()} >= {
        "plan.json",
        "events.jsonl",
        "01-words.json",
        "01-words.log",
        "03-slow.log",
    }
    assert mini.run().ran == () and mini.event("done")["seconds"] == 0


def test_a_job_is_as_the_formats_say(mini):
    folder = mini.run().folder
    job = json.loads((folder / "02-count.json").read_text())
    assert set(job) == {
        "stage",
        "params",
        "inputs",
        "sources",
        "secrets",
        "output",
        "scratch",
        "seed",
        "device",
        "provenance",
    }
    words = mini.plan().stages[0].artifact
    assert job["provenance"] == {"words": {"stage": "words", "key": words.key, "digest": words.digest}}
    assert json.loads((folder / "01-words.json").read_text())["params"] == {"upper": False, "times": 1}


def test_selections(mini):
    assert mini.run(last="count").ran == ("words", "count")
    assert mini.states() == {"words": "cached", "count": "cached", "slow": "run"}
    assert mini.run(only=("slow",)).ran == ("slow",)
    assert mini.run(first="count", force=True).ran == ("count", "slow")
    with pytest.raises(Refused, match="Did you mean count"):
        mini.plan(first="cuont")


def test_a_stage_whose_input_is_not_built_is_blocked(mini):
    assert mini.states(only=("count",)) == {"count": "blocked"}
    with pytest.raises(Refused, match="words not built"):
        mini.run(only=("count",))


def test_a_forced_stage_keeps_an_artifact_in_place_all_the_time(mini):
    mini.run()
    before = mini.plan().stages[0].artifact
    assert mini.run(only=("words",), force=True).ran == ("words",)
    after = mini.plan().stages[0].artifact
    assert (
        before.folder == after.folder
        and before.digest == after.digest
        and not list((mini.home / "store/tmp").iterdir())
    )


def test_what_depends_on_a_forced_stage_waits_for_it(mini):
    mini.run()
    assert mini.states(only=("words", "count"), force=True) == {"words": "run", "count": "waits"}
    assert mini.states(force=True) == {"words": "run", "count": "waits", "slow": "waits"}


def test_a_failure_says_found_expected_remedy_and_where_the_log_is(mini):
    toy.edit(mini.recipe, "steps: 3", "steps: 3\n    how: badly")
    assert mini.run().code == 1
    failed = mini.event("failed")
    assert (failed["found"], failed["expected"], failed["remedy"]) == (
        "a bad thing",
        "a good thing",
        "Make it good.",
    )
    assert "a bad thing" in open(failed["log"]).read()
    assert mini.states() == {"words": "cached", "count": "cached", "slow": "run"}


def test_an_output_that_lacks_what_its_type_needs_is_not_taken(mini):
    toy.edit(mini.recipe, "steps: 3", "steps: 3\n    how: empty")
    assert mini.run().code == 1
    assert mini.event("failed")["found"] == "no text.txt"
    assert mini.states()["slow"] == "run"


def test_a_stage_that_reports_an_error_and_exits_with_0_has_failed(mini):
    toy.edit(
        mini.repo / "stages/slow/__main__.py",
        'if how == "badly":',
        'job._emit("error", found="a bad thing", expected="", remedy="")\n    if how == "badly":',
    )
    assert mini.run().code == 1
    assert mini.event("failed")["found"] == "a bad thing" and mini.states()["slow"] == "run"


def test_a_stage_that_is_killed_says_so(mini):
    toy.edit(mini.recipe, "steps: 3", "steps: 3\n    how: crash")
    assert mini.run().code == 1
    assert "signal 9" in mini.event("failed")["found"]


def test_kill_9_in_the_middle_and_the_next_run_goes_on(mini):
    toy.edit(mini.recipe, "steps: 3", "steps: 40\n    seconds: 0.05")
    process = mini.start()
    wait_for(lambda: any(int(p.read_text() or 0) >= 3 for p in mini.home.glob("store/scratch/slow/*/done")))
    process.kill()
    process.wait()
    assert list(mini.home.glob("store/tmp/slow-*")) and not list(mini.home.glob("store/artifacts/slow/*"))
    assert mini.plan().stages[2].why.endswith("goes on where it stopped")
    assert mini.run().code == 0
    assert int(mini.text("slow").rsplit(" ", 1)[1]) >= 3
    assert not list(mini.home.glob("store/tmp/*")) and not list(mini.home.glob("store/scratch/slow/*"))


@pytest.mark.trap("half-written-artifact")
@pytest.mark.parametrize("moment", ["modes.seal", "hashing.settle", "_place"])
def test_kill_9_while_an_artifact_is_taken(mini, moment):
    process = mini.start(
        "from forge import store",
        "import os, signal",
        f"store.{moment} = lambda *a: os.kill(os.getpid(), signal.SIGKILL)",
    )
    assert process.wait() == -signal.SIGKILL
    assert set(mini.states().values()) == {"run", "waits"}
    assert mini.run().code == 0
    assert Store(mini.home).damage(mini.plan().stages[0].artifact) == ""


def test_a_full_disk_leaves_what_was_there_and_is_named(mini):
    """RLIMIT_FSIZE stops the stage's writes as a full disk does; the message for ENOSPC comes from a real
    small disk.
    """
    mini.run()
    toy.edit(mini.recipe, "steps: 3", "steps: 3\n    how: large")
    process = mini.start(
        "import resource, signal",
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)",
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, 8_000_000))",
    )
    assert process.wait() == 1, process.stdout.read()
    assert mini.states() == {"words": "cached", "count": "cached", "slow": "run"}
    assert mini.run().ran == ("slow",)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_no_space_left_is_named_with_its_remedy(mini):
    mini.home.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mini.home)], capture_output=True
    ).returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        toy.edit(mini.recipe, "steps: 3", "steps: 3\n    how: large")
        assert mini.run().code == 1
        assert (
            "a full disk (" in mini.event("failed")["found"]
            and "Free some space" in mini.event("failed")["remedy"]
        )
        assert mini.states() == {"words": "cached", "count": "cached", "slow": "run"}
    finally:
        subprocess.run(["umount", "-l", str(mini.home)], check=True)


def test_two_runs_at_once(mini):
    toy.edit(mini.recipe, "steps: 3", "steps: 30\n    seconds: 0.05")
    process = mini.start()
    wait_for(lambda: list(mini.home.glob("store/scratch/slow/*/done")))
    with pytest.raises(Refused, match=rf"held by process {process.pid} "):
        mini.run(wait=False)
    assert mini.run().ran == ()  # the other run has built it all by then
    assert str(process.pid) in mini.event("waiting")["holder"]
    assert process.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_stage_and_says_how_to_go_on(mini, number):
    toy.edit(mini.recipe, "steps: 3", "steps: 200\n    seconds: 0.05")
    process = mini.start()
    wait_for(lambda: list(mini.home.glob("store/scratch/slow/*/done")))
    process.send_signal(number)
    assert process.wait(10) == 130
    events = journal.events(max(mini.home.glob("runs/*")))
    assert events[-1]["event"] == "interrupted" and "build.py run --recipe toy" in events[-1]["resume"]
    assert not list(mini.home.glob("store/tmp/*"))


@pytest.mark.trap("half-written-artifact")
def test_a_damaged_artifact_is_not_taken_for_whole(mini):
    mini.run()
    folder = mini.plan().stages[1].artifact.folder
    (folder / "text.txt").unlink()
    stage = mini.plan().stages[1]
    assert (stage.state, stage.why) == ("run", "its artifact is damaged: text.txt is missing")
    assert mini.run().ran == ("count",)


def test_secrets_reach_the_stage_and_no_log(mini):
    secret = "s3cret-of-many-letters"
    (mini.repo / "token.txt").write_text(secret + "\n")
    (mini.repo / "token.txt").chmod(0o600)
    toy.edit(mini.recipe, "seed: 3", "seed: 3\nsecrets: {token: ../token.txt}")
    folder = mini.run().folder
    assert "the token is [secret]" in mini.log("words")
    assert not any(secret in p.read_text() for p in folder.iterdir())


def test_a_log_can_be_followed_while_it_grows(mini):
    toy.edit(mini.recipe, "steps: 3", "steps: 10\n    seconds: 0.05\n    how: badly")
    process = mini.start()
    wait_for(lambda: list(mini.home.glob("runs/*/03-slow.log")))
    text = []
    reader = threading.Thread(
        target=lambda: text.extend(journal.read_log(mini.home, mini.context().recipe, "slow", follow=True))
    )
    reader.start()
    reader.join(10)
    assert not reader.is_alive() and "a bad thing" in "".join(text)
    assert process.wait() == 1


def test_a_message_of_a_container_names_scratch_files_as_the_host_does():
    from forge.follow import _on_host

    event = {
        "event": "error",
        "found": "3 rows in /home/me/scratch/rows",
        "expected": "none",
        "remedy": "See /scratch/rejects.jsonl.",
    }
    assert _on_host(event, "/scratch", "/store/scratch/data/1") == {
        **event,
        "remedy": "See /store/scratch/data/1/rejects.jsonl.",
    }
    assert (
        _on_host(event, "", "/store") == event
        and _on_host({"event": "log", "x": "/scratch/a"}, "/scratch", "/s")["x"] == "/scratch/a"
    )


def test_a_stage_that_asks_for_it_is_given_its_newest_artifact(mini):
    contract = mini.repo / "stages/words/stage.toml"
    toy.edit(contract, 'image = "plain"', 'image = "plain"\nprevious = true')
    job = lambda outcome: json.loads((outcome.folder / "01-words.json").read_text())
    assert "previous" not in job(mini.run(last="words"))
    before = plan.artifact(mini.context(), "words").folder
    toy.edit(mini.recipe, "upper: false", "upper: true")
    assert job(mini.run(last="words"))["previous"] == str(before)
    toy.edit(contract, "previous = true", "")
    toy.edit(mini.recipe, "upper: true", "upper: false\n    times: 2")
    assert "previous" not in job(mini.run(last="words"))


@pytest.mark.parametrize(
    ("event", "values"),
    [
        ("progress", {"done": "half", "total": [1], "unit": 3, "note": None}),
        ("progress", {"done": math.nan, "total": math.inf}),
        ("metric", {"name": 3, "value": "low"}),
        ("metric", {"name": "loss", "value": math.nan}),
        ("warning", {"message": {}}),
    ],
)
def test_an_event_with_fields_of_other_types_ends_neither(mini, monkeypatch, event, values):
    monkeypatch.setattr(watch, "_EVERY", 0)
    code = (
        f"def run(task):\n    nan, inf = float('nan'), float('inf')\n    job._emit({event!r}, **{values!r})\n"
    )
    toy.edit(mini.repo / "stages/count/__main__.py", "def run(task):\n", code)
    with watch.Lines(Console(file=io.StringIO())) as lines:

        def listener(event):
            lines(event)
            assert screen.lines(lines.progress, time.monotonic(), 80, 24)

        assert run.run(mini.context(), Local(mini.repo, mini.home), plan.Selection(), listener).code == 0


@pytest.mark.parametrize("event", ["error", "warning", "metric", "progress"])
def test_an_event_that_lacks_its_fields_ends_the_stage_and_not_forge(mini, event):
    code = f"def run(task):\n    job._emit({event!r})\n"
    toy.edit(mini.repo / "stages/count/__main__.py", "def run(task):\n", code)
    assert mini.run().code == (1 if event == "error" else 0)
