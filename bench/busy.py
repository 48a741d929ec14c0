"""Teaches the tiny base next to other work, to see how the waiting policy of OpenMP's threads affects speed
on a busy machine.

    python -m bench.busy BASE DATA [SECONDS]

BASE and DATA are the outputs of `build.py path base` and `build.py path data`. Prints the steps that each
policy completes in SECONDS (default 15), alone and next to busy loops. The processes run one after the other,
so compare only rows of the same run.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from model.layers.structure import Model

ENVIRONMENTS: dict[str, dict[str, str]] = {
    "as GNU OpenMP comes": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
}
BESIDE = (0, 2, 3)  # busy loops
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
WARM = 3  # steps that are not counted


class Enough(Exception):
    """The time is over."""


def steps(base: Path, data: Path, seconds: float) -> int:
    """Number of steps of stage base's second phase that this process completes in `seconds`."""
    import torch

    from model.families.nemotron_h import native
    from model.families.nemotron_h.chat import Rendered
    from stages import dataset
    from stages.base import teach

    torch.set_num_threads(2)
    rows = [
        Rendered(row["text"], row["input_ids"], row["labels"])
        for _, row in dataset.read(data / "train.jsonl")
    ]
    model = cast("Model", native.load(base)).requires_grad_(True)
    model.set_experts_implementation("eager")
    count, began = 0, 0.0

    def on_step(step: int, loss: float) -> None:
        nonlocal count, began
        if step <= WARM:
            began = time.monotonic()
        elif time.monotonic() - began > seconds:
            raise Enough
        else:
            count += 1

    with contextlib.suppress(Enough):
        teach.teach(model, rows, 100_000, 1024, 1e-6, 0, on_step)
    return count


def main(base: str, data: str, seconds: float = 15.0) -> None:
    plain = {name: value for name, value in os.environ.items() if name not in WAITING}
    print(
        f"{'steps in ' + format(seconds, 'g') + ' s':26s}"
        + "".join(f"{f'{n} busy loops':>14s}" for n in BESIDE)
    )
    for name, variables in ENVIRONMENTS.items():
        row = []
        for count in BESIDE:
            loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
            command = [sys.executable, "-m", "bench.busy", base, data, str(seconds), "--count"]
            try:
                finished = subprocess.run(
                    command, env={**plain, **variables}, stdout=subprocess.PIPE, text=True, check=True
                )
                row.append(int(finished.stdout))
            finally:
                for loop in loops:
                    loop.kill()
        print(f"{name:26s}" + "".join(f"{value:14,}" for value in row), flush=True)


if __name__ == "__main__":
    if "--count" in sys.argv:
        print(steps(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])))
    else:
        main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:]))
