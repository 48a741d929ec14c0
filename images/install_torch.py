"""Installs torch from torch-<machine>.lock into the environment of the Python that runs this.

    python install_torch.py UV...

`UV...` is the command that starts uv. machines.toml beside this file says which package index torch comes
from; a folder of wheels in ANNIE_WHEELS or PIP_FIND_LINKS is used instead where it holds a torch for this
machine.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(uv: list[str]) -> int:
    machine = platform.machine()
    lock = HERE / f"torch-{machine}.lock"
    if not lock.exists():
        print(f"found: a machine of type {machine}, for which there is no torch lock")
        print(f"expected: one of {', '.join(sorted(path.name for path in HERE.glob('torch-*.lock')))}")
        return 1
    install = [*uv, "pip", "install", "--python", sys.executable, "--no-deps", "--require-hashes"]
    return subprocess.run([*install, *source(machine, os.environ), "-r", str(lock)]).returncode


def source(machine: str, environment: Mapping[str, str]) -> list[str]:
    """uv's options for where torch comes from on `machine`."""
    folder = environment.get("ANNIE_WHEELS") or environment.get("PIP_FIND_LINKS")
    if folder and any(Path(folder).glob(f"torch-*_{machine}.whl")):
        return ["--no-index", "--find-links", folder]
    index = tomllib.loads((HERE / "machines.toml").read_text())[machine].get("torch_index")
    return ["--index-url", index] if index else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
