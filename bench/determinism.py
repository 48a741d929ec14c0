"""Checks whether runs of stage train with `deterministic: true` give the same bits, also when killed and
resumed, and measures the cost.

    python -m bench.determinism --folder /tmp/check [--tiny] [--ranks 2]

Each row is a separate run of the stage: seven layers at the real widths (from bench.merge_check),
conversations of 64 to 512 tokens, lora of rank 16 on all targets, the last third of the steps through the
export's rounding with the unrounded model as teacher. The killed run gets SIGKILL once its first checkpoint
is complete, and is started again. Exits 1 if deterministic runs differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import merge_check, stage_job
from stages.train import checkpoints

STEPS, EVERY = 24, 8
ROWS = (
    ("whole", True, False),
    ("again", True, False),
    ("killed and resumed", True, True),
    ("not deterministic", False, False),
    ("again", False, False),
)


def data(folder: Path, vocabulary: int, low: int, high: int) -> None:
    """Sixty-four conversations of `low` to `high` tokens."""
    numbers = random.Random(0)
    stage_job.write_rows(
        folder,
        (
            [numbers.randrange(20, vocabulary // 10) for _ in range(numbers.randint(low, high))]
            for _ in range(64)
        ),
    )


def run(folder: Path, number: int, params: dict[str, Any], device: str, kill: bool) -> dict[str, Any]:
    """Runs stage train once: the adapter's SHA-256, the last loss, tokens per second. Raises RuntimeError
    with the end of its log if it fails.
    """
    output, scratch = folder / f"output-{number}", folder / f"scratch-{number}"
    shutil.rmtree(scratch, ignore_errors=True)
    inputs = {"base": folder / "base", "data": folder / "data"}
    command = stage_job.command(
        "train", folder / f"train-{number}.json", device, inputs, output, scratch, params
    )
    log = folder / f"train-{number}.log"
    with log.open("w") as opened:
        if kill:
            process = subprocess.Popen(command, cwd=stage_job.REPO, stdout=opened, stderr=opened)
            while process.poll() is None and checkpoints.newest(scratch)[0] is None:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            if process.wait() == 0:
                raise RuntimeError(
                    "the run ended before it could be killed; expected a checkpoint before its last step"
                )
        began = time.monotonic()
        ended = subprocess.run(command, cwd=stage_job.REPO, stdout=opened, stderr=opened)
    if ended.returncode:
        raise RuntimeError(log.read_text()[-2000:])
    report = json.loads((output / "training.json").read_text())
    losses = [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]
    return {
        "sha256": hashlib.sha256((output / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "loss": losses[-1]["train"],
        "tokens": report["tokens_per_second"],
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="where the checkpoint and the runs lie; 20 GB at the real widths",
    )
    parser.add_argument("--tiny", action="store_true", help="small widths")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run, one per GPU")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.folder / "base").exists():
        merge_check.base(options.folder, options.tiny, device)
    if not (options.folder / "data").exists():
        data(
            options.folder / "data",
            merge_check.config(options.tiny)["vocab_size"],
            *((16, 64) if options.tiny else (64, 512)),
        )
    params = {
        "targets": "all",
        "rank": 16,
        "steps": STEPS,
        "eval_every": EVERY,
        "save_every": EVERY,
        "qat_share": 1 / 3,
        "qat_loss": "teacher",
        "gradient_checkpointing": True,
        "ranks": options.ranks,
        "precision": "float32" if device == "cpu" else "bfloat16",
    }
    print(
        f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, torch {torch.__version__},"
        f" {options.ranks} process{'es' * (options.ranks > 1)}\n{'run':20s} {'adapter':12s}"
        f" {'last loss':>10s} {'tokens/s':>9s} {'s':>5s}",
        flush=True,
    )
    digests = set()
    for number, (name, deterministic, kill) in enumerate(ROWS):
        figures = run(options.folder, number, params | {"deterministic": deterministic}, device, kill)
        digests |= {figures["sha256"]} if deterministic else set()
        print(
            f"{name:20s} {figures['sha256'][:12]} {figures['loss']:10.6f} {figures['tokens']:9,}"
            f" {figures['seconds']:5.0f}",
            flush=True,
        )
    sys.exit(f"found {len(digests)} adapters of deterministic runs; expected one" if len(digests) > 1 else 0)


if __name__ == "__main__":
    main()
