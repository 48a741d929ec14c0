"""Every fault that is tried on purpose, on the small recipe's NVFP4 model: `make chaos`.

    python tests/chaos/run.py [--short] [--executor docker]

What the executor makes has to be built (make demo; make model RECIPE=tiny for docker). Kills of the image
build need an engine and its artifacts. Exits with 1 if a fault did harm.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests"))
import run as rooms  # noqa: E402

QUICK = "tests/chaos/quick.yaml"
# Kills of each stage: about an hour.
KILLS = {"train": 40, "merge": 100, "quantize": 100}
IMAGE_KILLS = 70


def built(stage: str, executor: str) -> Path | None:
    """The folder of the small recipe's artifact, if it is there."""
    command = [sys.executable, str(REPO / "build.py"), "path", stage]
    shown = subprocess.run(
        [*command, "--recipe", "tiny", "--executor", executor], capture_output=True, text=True
    )
    return None if shown.returncode else Path(shown.stdout.strip())


def served(model: Path, options: list[str]) -> bool:
    """Faults of a served model."""
    command, variables = rooms.interpreter("vllm")
    vllm = Path(command[0]).parent / "vllm"
    version = subprocess.run(
        [*command, "-c", "import importlib.metadata as m; print(m.version('vllm'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    flags = ["--vllm", str(vllm), "--version", version, *options]
    environment = {**os.environ, **variables, "GOMP_SPINCOUNT": "30000"}
    return not subprocess.run(
        [*command, "-m", "tests.chaos.served", str(model), *flags], cwd=REPO, env=environment
    ).returncode


def stored(fault: str, executor: str, count: int, *options: str) -> bool:
    """Faults of the store."""
    command = [sys.executable, "-m", "tests.chaos.stored", fault, "--executor", executor]
    return not subprocess.run([*command, "--count", str(count), *options], cwd=REPO).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a few of each: six minutes")
    parser.add_argument("--executor", default="local", choices=["docker", "local"])
    options = parser.parse_args()
    model = built("quantize", options.executor)
    if not model:
        print("the small recipe is not built: make demo, or make model RECIPE=tiny", file=sys.stderr)
        return 1
    short, executor = options.short, options.executor
    fine = [
        served(
            model,
            ["--requests", "100", "--hang-ups", "20", "--ends", "SIGTERM,kill -9 of the engine"]
            if short
            else [],
        ),
        stored("flips", executor, 20 if short else 200),
    ]
    if short:
        fine.append(stored("kills", executor, 3, "--stages", "merge"))
    else:
        fine += [
            stored("kills", "local", count, "--stages", stage, "--recipe", QUICK)
            for stage, count in KILLS.items()
        ]
    if built("package", "docker"):
        fine.append(stored("kills", "docker", 3 if short else IMAGE_KILLS, "--stages", "package"))
    return not all(fine)


if __name__ == "__main__":
    sys.exit(main())
