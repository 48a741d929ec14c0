"""What the tests of whole lines share: the commands as a person types them."""

from __future__ import annotations

import os
import subprocess
import sys
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
