"""Runs mypy on both sides, each with the libraries that it runs with; settings are in pyproject.toml.

    .venv/bin/python tests/lint.py

The host side (`files` in pyproject.toml) is checked in `.venv`, model/ in the train environment (made from
its locked requirements if it is not there yet).
"""

from __future__ import annotations

import subprocess
import sys

from run import REPO, prepared

MODEL = "model"


def main() -> int:
    mypy = [sys.executable, "-m", "mypy"]
    host = subprocess.run(mypy, cwd=REPO)
    # A cache of its own: the same library may have another version in the other environment.
    cache = ["--cache-dir", ".mypy_cache/train"]
    model = subprocess.run([*mypy, *cache, "--python-executable", str(prepared("train")), MODEL], cwd=REPO)
    return host.returncode or model.returncode


if __name__ == "__main__":
    sys.exit(main())
