"""What the tests of whole lines share: the commands as a person types them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
HOME = Path(os.environ.get("ANNIE_HOME", REPO / ".annie"))
BUILD = [sys.executable, str(REPO / "build.py")]


def ran(*command: str, code: int = 0, home: Path = HOME, folder: Path = REPO) -> str:
    """What a command prints (stdout and stderr together) in `folder`; its exit status has to be `code`."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "ANNIE_HOME": str(home), "COLUMNS": "160"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def free_port() -> str:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return str(opened.getsockname()[1])


@contextlib.contextmanager
def serving(*command: str, said: str, folder: Path = REPO) -> Iterator[None]:
    """Runs a command that serves, from when it prints `said` until the end, when Ctrl-C stops it."""
    server = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Ctrl-C is to be heard, also where these tests run in a shell's background, which ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert server.stdout and any(said in line for line in server.stdout)
        yield
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.wait(60)
