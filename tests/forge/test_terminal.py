"""Runs in a real terminal: what they show in one of 80 x 24, and that they outlive one that closes."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import toy

from forge import journal

RUN = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import build
build.REPO = Path(sys.argv[2])
build.cli(["run", "--recipe", "toy", "--executor", "local"])
"""


class Terminal:
    """A run of the miniature repository in a terminal of its own, of 80 x 24. Without `controls` the kernel
    tells the run nothing of its end, and writing to it fails.
    """

    def __init__(self, mini, controls=True, term="xterm"):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

        def own():
            os.setsid()
            if controls:
                fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(toy.REPO), str(mini.repo)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={"PATH": os.environ["PATH"], "TERM": term, "ANNIE_HOME": str(mini.home), "LANG": "C.UTF-8"},
            preexec_fn=own,
        )
        os.close(slave)
        self.text = ""

    def read_until(self, word):
        while word not in self.text:
            self.text += os.read(self.master, 1 << 16).decode(errors="replace")

    def close(self):
        os.close(self.master)


@pytest.fixture
def slow(mini):
    """The miniature repository, whose last stage takes a second."""
    toy.edit(mini.recipe, "steps: 3", "steps: 10\n    seconds: 0.2")
    return mini


def waited(condition):
    for _ in range(600):
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError("it did not come to that within 30 s")


def told(mini):
    return [event["event"] for event in journal.events(journal.runs(mini.home, "toy")[0])]


@pytest.mark.parametrize("controls", [True, False], ids=["with SIGHUP", "by EIO alone"])
def test_a_run_outlives_its_terminal(slow, command, controls):
    terminal = Terminal(slow, controls)
    terminal.read_until("/10 steps")
    terminal.close()
    waited(lambda: "unattended" in told(slow))
    status = command("status")
    assert "a run is under way" in status and "▸ slow" in status and "/10 steps" in status
    assert "The terminal that started it closed at " in status
    assert terminal.process.wait(30) == 0
    assert slow.text("slow") == "went on from 0"
    assert told(slow).count("unattended") == 1 and told(slow)[-1] == "done"
    assert slow.log("slow").count("The terminal that started this run has closed. The run goes on.") == 1
    assert "under way" not in command("status")


def test_a_run_without_a_terminal_takes_no_notice_of_sighup(slow, tmp_path):
    with open(tmp_path / "out", "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(toy.REPO), str(slow.repo)],
            stdout=output,
            stderr=output,
            env={"PATH": os.environ["PATH"], "ANNIE_HOME": str(slow.home)},
        )
    waited(lambda: journal.runs(slow.home, "toy") and "progress" in told(slow))
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0 and "unattended" in told(slow)
    assert "slow: done" in (tmp_path / "out").read_text(), "what goes to a file still does"


def test_a_killed_run_is_cut_off_and_status_names_the_command_that_goes_on(slow, command):
    terminal = Terminal(slow)
    terminal.read_until("/10 steps")
    assert json.loads(command("status", "--json"))["last"]["ending"] == "under way"
    terminal.process.kill()
    terminal.process.wait()
    terminal.close()
    status = command("status")
    assert "the last run was cut off in slow" in status
    assert "to go on: python build.py run --recipe toy --executor local\n" in status
    last = json.loads(command("status", "--json"))
    assert last["progress"] is None and last["last"]["ending"] == "cut off in slow"
    command("run", "--until", "count")
    assert slow.run(last="slow").code == 0 and int(slow.text("slow").split()[-1]) > 0, "it went on"


def test_a_dumb_terminal_gets_sober_lines(mini):
    terminal = Terminal(mini, term="dumb")
    terminal.read_until("slow: done")
    assert "\x1b" not in terminal.text and "words: done" in terminal.text
    assert terminal.process.wait(30) == 0
    terminal.close()
