"""Runs mypy on both sides, each with the libraries that it runs with; settings are in pyproject.toml.

    .venv/bin/python tests/lint.py [--executors]

The host side (`files` in pyproject.toml) is checked in `.venv`, the other rooms in the train environment
(made from its locked requirements if it is not there yet). With --executors only their classes are checked.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from run import REPO, prepared

ROOMS = ("model", "stages", "bench")
MYPY = [sys.executable, "-m", "mypy"]


def executors() -> int:
    """Checks every class of `EXECUTORS` against the protocol: they are named in strings there,
    which mypy does not follow. Exit status.
    """
    from forge.executors import EXECUTORS

    lines = [
        "from pathlib import Path",
        "from forge.executor import Executor",
    ]
    for name, entry in EXECUTORS.items():
        module, _, class_name = entry.place.partition(":")
        lines += [f"import {module}", f"{name}: Executor = {module}.{class_name}(Path(), Path())"]
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "every_executor.py"
        code.write_text("\n".join([*lines, ""]))
        return subprocess.run([*MYPY, code], cwd=REPO, env={**os.environ, "MYPYPATH": str(REPO)}).returncode


def main() -> int:
    if sys.argv[1:] == ["--executors"]:
        return executors()
    host = subprocess.run(MYPY, cwd=REPO).returncode
    # A cache of its own: the same library may have another version in the other environment.
    cache = ["--cache-dir", ".mypy_cache/train"]
    python = ["--python-executable", str(prepared("train"))]
    rooms = subprocess.run([*MYPY, *cache, *python, *ROOMS], cwd=REPO)
    return host or executors() or rooms.returncode


if __name__ == "__main__":
    sys.exit(main())
