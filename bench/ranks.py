"""Measures steps of stage train on one and several GPUs: how much faster, and how long a rank waits for the
slowest.

    python -m bench.ranks [--gpus 1,2] [--lengths mixed,voice,equal] [--documents 8] [--steps 30] [--layers
    52] [--sharded] [--deterministic]

Each number of GPUs is a run of its own, with `--documents` conversations per GPU and step (bench/lengths.py
has the lengths), random weights in NF4, LoRA of rank 16 on all targets. The steps are the stage's own
(stages/train/loop.py). A rank waits from the end of its backward until the slowest rank's. Printed is the
waiting share of all steps on the worst rank. Times are of all steps but the first three.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.train import start

if TYPE_CHECKING:
    from model.layers.structure import Model

start.before_torch(lambda message, remedy: print(message, remedy, file=sys.stderr))

import torch  # noqa: E402
import torch.distributed as distributed  # noqa: E402

from bench import lengths, operations, stage_job  # noqa: E402
from bench.figures import counted, summary  # noqa: E402
from bench.ours import ALPHA, RANK  # noqa: E402
from model import adapter, assemble  # noqa: E402
from model.layers import determinism, recompute  # noqa: E402
from model.weights.shards import Shards  # noqa: E402
from stages import job  # noqa: E402
from stages.train import ranks  # noqa: E402
from stages.train.loop import Loop  # noqa: E402


@dataclass(frozen=True)
class Timed(ranks.Ranks):
    """Ranks that record how many seconds this one waits before each sum."""

    waited: list[float] = field(default_factory=list)

    def sum(self, tensors: list[torch.Tensor]) -> None:
        if self.world > 1:
            torch.cuda.synchronize()
            began = time.perf_counter()
            distributed.barrier()
            torch.cuda.synchronize()
            self.waited.append(time.perf_counter() - began)
        super().sum(tensors)


def rows(plan: list[tuple[int, ...]], vocabulary: int) -> list[dict[str, Any]]:
    """Conversations with these lengths in the plan's order, in the form of stage data."""
    conversations: list[dict[str, Any]] = []
    for number, step in enumerate(plan):
        for conversation in lengths.conversations(step, vocabulary, number):
            conversations.append(
                {
                    "input_ids": conversation.ids.tolist(),
                    "labels": conversation.labels.tolist(),
                    "number": len(conversations),
                }
            )
    return conversations


def measure(
    kind: str, model: Model, config: dict[str, Any], timed_ranks: Timed, options: argparse.Namespace
) -> dict[str, Any]:
    """Measures one kind of lengths on an existing model: median milliseconds, tokens per second, and the
    worst rank's wait.
    """
    plan = lengths.plan(kind, options.steps * timed_ranks.world, options.documents)
    params = stage_job.defaults("train") | {
        "steps": options.steps,
        "batch": options.documents * timed_ranks.world,
        "batch_tokens": lengths.CAPACITY * timed_ranks.world * (kind in lengths.PACKED),
        "gradient_checkpointing": True,
        "sharded": options.sharded,
        "ranks": timed_ranks.world,
    }
    with tempfile.TemporaryDirectory() as folder:
        task = job.Job("train", params, {}, Path(folder), Path(folder), 0, device="cuda")
        loop = Loop(task, model, rows(plan, config["vocab_size"]), [], timed_ranks)
        if not options.sharded:
            loop.capture(0)
        timed_ranks.waited.clear()
        times = []
        torch.cuda.reset_peak_memory_stats()
        for number in range(options.steps):
            timed_ranks.wait()
            torch.cuda.synchronize()
            began = time.perf_counter()
            loop.step(number)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    tokens = [
        sum(loop.order.lengths[row] for row in loop.order.step(number)) for number in range(options.steps)
    ]
    figures = summary(times, tokens, tokens)
    timed = counted(len(times))
    waited = torch.tensor([sum(timed_ranks.waited[timed]) / sum(times[timed])], device="cuda")
    if timed_ranks.world > 1:
        distributed.all_reduce(waited, distributed.ReduceOp.MAX)
    return {
        "kind": kind,
        "gpus": timed_ranks.world,
        "ms": figures["ms"],
        "speed": figures["tokens_per_s"],
        "waited": waited.item(),
        "peak": torch.cuda.max_memory_allocated() / 1e9,
        "loss": loop.history.train[options.steps],
    }


def work(options: argparse.Namespace) -> None:
    """Measures all kinds of lengths in this process, which torchrun started. The first rank prints a line of
    JSON for each.
    """
    if options.deterministic:
        determinism.before_torch()
        determinism.enable()
    joined = ranks.join("cuda")
    timed_ranks = Timed(joined.rank, joined.world)
    config = operations.sizes(options.layers)
    shards = Shards(timed_ranks.rank, timed_ranks.world) if options.sharded else Shards()
    model = assemble.random(
        config, "nf4", torch.bfloat16, f"cuda:{torch.cuda.current_device()}", shards=shards
    )
    adapter.attach(model, "all", RANK, ALPHA, 0)
    recompute.attach(model.train(), lengths.CAPACITY)
    for kind in lengths.kinds(options.lengths):
        row = measure(kind, model, config, timed_ranks, options)
        if timed_ranks.first:
            print("row " + json.dumps(row), flush=True)
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", default="1,2", help="numbers of GPUs, comma-separated")
    parser.add_argument("--lengths", default="mixed,voice,equal")
    parser.add_argument(
        "--documents", type=int, default=lengths.DOCUMENTS, help="conversations a GPU and step"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--layers", type=int, default=52)
    parser.add_argument("--sharded", action="store_true", help="each GPU holds its share of the base")
    parser.add_argument("--deterministic", action="store_true")
    options = parser.parse_args()
    if ranks.under_torchrun():
        work(options)
        return
    lengths.kinds(options.lengths)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.layers} layers,"
        f" {options.documents} conversations a GPU and"
        f" step{', sharded' if options.sharded else ''}\n{'lengths':10s} {'GPUs':>4s} {'ms/step':>8s}"
        f" {'tokens/s':>9s} {'times one':>9s} {'waited':>7s} {'peak GB':>8s}  loss",
        flush=True,
    )
    alone: dict[str, float] = {}
    for count in map(int, options.gpus.split(",")):
        command = ranks.torchrun_command(count, "bench.ranks", *sys.argv[1:])
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            for line in run.stdout or ():
                if not line.startswith("row "):
                    continue
                row = json.loads(line[4:])
                if count == 1:
                    alone[row["kind"]] = row["speed"]
                times = f"{row['speed'] / alone[row['kind']]:9.2f}" if row["kind"] in alone else f"{'':9s}"
                print(
                    f"{row['kind']:10s} {count:4d} {row['ms']:8,.0f} {row['speed']:9,.0f} {times}"
                    f" {row['waited']:7.1%} {row['peak']:8.1f}  {row['loss']:.5f}",
                    flush=True,
                )
        if run.returncode:
            sys.exit(f"the run on {count} GPUs ended with {run.returncode}; its output is above")


if __name__ == "__main__":
    main()
