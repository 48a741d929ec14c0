"""Runs: what they make, how they fail, and what is left when they are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time

import pytest
import toy

from forge import journal, plan
from forge.finding import Refused
from forge.store import Store


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def test_a_run_makes_every_stage_once(its):
    outcome = its.run()
    assert (outcome.code, outcome.ran) == (0, ("words", "count", "slow"))
    assert (its.text("words"), its.text("count"), its.text("slow")) == (
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
    assert its.run().ran == () and its.event("done")["seconds"] == 0


def test_a_job_is_as_the_formats_say(its):
    folder = its.run().folder
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
    words = its.plan().stages[0].artifact
    assert job["provenance"] == {"words": {"stage": "words", "key": words.key, "digest": words.digest}}
    assert json.loads((folder / "01-words.json").read_text())["params"] == {"upper": False, "times": 1}


def test_selections(its):
    assert its.run(last="count").ran == ("words", "count")
    assert its.states() == {"words": "cached", "count": "cached", "slow": "run"}
    assert its.run(only=("slow",)).ran == ("slow",)
    assert its.run(first="count", force=True).ran == ("count", "slow")
    with pytest.raises(Refused, match="Did you mean count"):
        its.plan(first="cuont")


def test_a_stage_whose_input_is_not_built_is_blocked(its):
    assert its.states(only=("count",)) == {"count": "blocked"}
    with pytest.raises(Refused, match="words not built"):
        its.run(only=("count",))


def test_a_forced_stage_keeps_an_artifact_in_place_all_the_time(its):
    its.run()
    before = its.plan().stages[0].artifact
    assert its.run(only=("words",), force=True).ran == ("words",)
    after = its.plan().stages[0].artifact
    assert (
        before.folder == after.folder
        and before.digest == after.digest
        and not list((its.home / "store/tmp").iterdir())
    )


def test_a_failure_says_found_expected_remedy_and_where_the_log_is(its):
    toy.edit(its.recipe, "steps: 3", "steps: 3\n    how: badly")
    assert its.run().code == 1
    failed = its.event("failed")
    assert (failed["found"], failed["expected"], failed["remedy"]) == (
        "a bad thing",
        "a good thing",
        "Make it good.",
    )
    assert "a bad thing" in open(failed["log"]).read()
    assert its.states() == {"words": "cached", "count": "cached", "slow": "run"}


def test_an_output_that_lacks_what_its_type_needs_is_not_taken(its):
    toy.edit(its.recipe, "steps: 3", "steps: 3\n    how: empty")
    assert its.run().code == 1
    assert its.event("failed")["found"] == "no text.txt"
    assert its.states()["slow"] == "run"


def test_a_stage_that_is_killed_says_so(its):
    toy.edit(its.recipe, "steps: 3", "steps: 3\n    how: crash")
    assert its.run().code == 1
    assert "signal 9" in its.event("failed")["found"]


def test_kill_9_in_the_middle_and_the_next_run_goes_on(its):
    toy.edit(its.recipe, "steps: 3", "steps: 40\n    seconds: 0.05")
    process = its.start()
    wait_for(lambda: any(int(p.read_text() or 0) >= 3 for p in its.home.glob("store/scratch/slow/*/done")))
    process.kill()
    process.wait()
    assert list(its.home.glob("store/tmp/slow-*")) and not list(its.home.glob("store/artifacts/slow/*"))
    assert its.plan().stages[2].why.endswith("goes on where it stopped")
    assert its.run().code == 0
    assert int(its.text("slow").rsplit(" ", 1)[1]) >= 3
    assert not list(its.home.glob("store/tmp/*")) and not list(its.home.glob("store/scratch/slow/*"))


@pytest.mark.trap("half-written-artifact")
@pytest.mark.parametrize("moment", ["_seal", "_sync", "_place"])
def test_kill_9_while_an_artifact_is_taken(its, moment):
    process = its.start(
        "from forge import store",
        "import os, signal",
        f"store.{moment} = lambda *a: os.kill(os.getpid(), signal.SIGKILL)",
    )
    assert process.wait() == -signal.SIGKILL
    assert set(its.states().values()) == {"run", "waits"}
    assert its.run().code == 0
    assert Store(its.home).damage(its.plan().stages[0].artifact) == ""


def test_a_full_disk_leaves_what_was_there_and_is_named(its):
    """RLIMIT_FSIZE stops the stage's writes as a full disk does; the message for ENOSPC comes from a real
    small disk.
    """
    its.run()
    toy.edit(its.recipe, "steps: 3", "steps: 3\n    how: large")
    process = its.start(
        "import resource, signal",
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)",
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, 8_000_000))",
    )
    assert process.wait() == 1, process.stdout.read()
    assert its.states() == {"words": "cached", "count": "cached", "slow": "run"}
    assert its.run().ran == ("slow",)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_no_space_left_is_named_with_its_remedy(its):
    its.home.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(its.home)], capture_output=True
    ).returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        toy.edit(its.recipe, "steps: 3", "steps: 3\n    how: large")
        assert its.run().code == 1
        assert (
            "the disk is full" in its.event("failed")["found"]
            and "Free some space" in its.event("failed")["remedy"]
        )
        assert its.states() == {"words": "cached", "count": "cached", "slow": "run"}
    finally:
        subprocess.run(["umount", "-l", str(its.home)], check=True)


def test_two_runs_at_once(its):
    toy.edit(its.recipe, "steps: 3", "steps: 30\n    seconds: 0.05")
    process = its.start()
    wait_for(lambda: list(its.home.glob("store/scratch/slow/*/done")))
    with pytest.raises(Refused, match=rf"held by process {process.pid} "):
        its.run(wait=False)
    assert its.run().ran == ()  # the other run has built it all by then
    assert str(process.pid) in its.event("waiting")["holder"]
    assert process.wait() == 0


def test_ctrl_c_stops_the_stage_and_says_how_to_go_on(its):
    toy.edit(its.recipe, "steps: 3", "steps: 200\n    seconds: 0.05")
    process = its.start()
    wait_for(lambda: list(its.home.glob("store/scratch/slow/*/done")))
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    events = journal.events(max(its.home.glob("runs/*")))
    assert events[-1]["event"] == "interrupted" and "build.py run --recipe toy" in events[-1]["resume"]
    assert not list(its.home.glob("store/tmp/*"))


@pytest.mark.trap("half-written-artifact")
def test_a_damaged_artifact_is_not_taken_for_whole(its):
    its.run()
    folder = its.plan().stages[1].artifact.folder
    (folder / "text.txt").unlink()
    stage = its.plan().stages[1]
    assert (stage.state, stage.why) == ("run", "its artifact is damaged: text.txt is missing")
    assert its.run().ran == ("count",)


def test_secrets_reach_the_stage_and_no_log(its):
    secret = "s3cret-of-many-letters"
    (its.repo / "token.txt").write_text(secret + "\n")
    (its.repo / "token.txt").chmod(0o600)
    toy.edit(its.recipe, "seed: 3", "seed: 3\nsecrets: {token: token.txt}")
    folder = its.run().folder
    assert "the token is [secret]" in its.log("words")
    assert not any(secret in p.read_text() for p in folder.iterdir())


def test_a_log_can_be_followed_while_it_grows(its):
    toy.edit(its.recipe, "steps: 3", "steps: 10\n    seconds: 0.05\n    how: badly")
    process = its.start()
    wait_for(lambda: list(its.home.glob("runs/*/03-slow.log")))
    text = []
    reader = threading.Thread(
        target=lambda: text.extend(journal.read_log(its.home, "toy", "slow", ["slow"], follow=True))
    )
    reader.start()
    reader.join(10)
    assert not reader.is_alive() and "a bad thing" in "".join(text)
    assert process.wait() == 1


def test_a_message_of_a_container_names_scratch_files_as_the_host_does():
    from forge.run import _on_host

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


def test_a_stage_that_asks_for_it_is_given_its_newest_artifact(its):
    contract = its.repo / "stages/words/stage.toml"
    toy.edit(contract, 'image = "plain"', 'image = "plain"\nprevious = true')
    job = lambda outcome: json.loads((outcome.folder / "01-words.json").read_text())
    assert "previous" not in job(its.run(last="words"))
    before = plan.artifact(its.context(), "words").folder
    toy.edit(its.recipe, "upper: false", "upper: true")
    assert job(its.run(last="words"))["previous"] == str(before)
    toy.edit(contract, "previous = true", "")
    toy.edit(its.recipe, "upper: true", "upper: false\n    times: 2")
    assert "previous" not in job(its.run(last="words"))
