"""Every fault that is tried on purpose, on the small recipe's NVFP4 model: `make chaos`.

    python tests/chaos/run.py [--requests 1000] [--hang-ups 100]

The model has to be built (make demo). Exits with 1 if a fault did harm.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests"))
import run as rooms  # noqa: E402


def main(arguments: list[str]) -> int:
    build = [sys.executable, str(REPO / "build.py")]
    line = ["--recipe", "tiny", "--executor", "local"]
    built = subprocess.run([*build, "path", "quantize", *line], capture_output=True, text=True)
    if built.returncode:
        print(f"{built.stderr.strip()}\nBuild it first: make demo", file=sys.stderr)
        return 1
    command, variables = rooms.interpreter("vllm")
    vllm = Path(command[0]).parent / "vllm"
    version = subprocess.run(
        [*command, "-c", "import importlib.metadata as m; print(m.version('vllm'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    options = ["--vllm", str(vllm), "--version", version]
    return subprocess.run(
        [*command, "-m", "tests.chaos.served", built.stdout.strip(), *options, *arguments],
        cwd=REPO,
        env={**os.environ, **variables, "GOMP_SPINCOUNT": "30000"},
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
