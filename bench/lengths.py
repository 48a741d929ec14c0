"""Training steps on conversations whose lengths differ, as stage train does them, on one GPU with all 52 layers.

    python -m bench.lengths equal,mixed,voice,voice-packed [--steps 100] [--tiles] [--eager] [--deterministic]

Random weights in NF4, LoRA of rank 16 on all targets, AdamW. Lengths are drawn evenly from a range, anew for every step:

    equal         8 documents of 2,048 tokens
    mixed         8 of 650 to 1,400
    voice         8 of 150 to 400
    voice-packed  as many of 150 to 400 as fit into 16,384 tokens

`--tiles` takes our own grouped products (nemotron/tiles.py) in place of torch's, as every GPU but Hopper and data-centre Blackwell
does; `--eager` runs without CUDA graphs. Compilations are Triton's, after the third step of each kind of lengths.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as stages/train/__main__.py

import torch
from torch import nn

from bench import operations
from bench.ours import ALPHA, RANK
from nemotron import adapter, assemble, determinism, grouped, recompute
from nemotron.chat import IGNORED
from nemotron.documents import Documents

CAPACITY = 16384  # tokens of a packed sequence
RANGES = {"equal": (2048, 2048), "mixed": (650, 1400), "voice": (150, 400), "voice-packed": (150, 400)}
WARM = 3  # steps before compilations count


def started() -> float:
    """When this process was started, on the clock of time.time()."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    booted = next(int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    return booted + ticks / os.sysconf("SC_CLK_TCK")


def draw(kind: str, numbers: random.Random) -> tuple[int, ...]:
    """The lengths of one step's documents."""
    low, high = RANGES[kind]
    if kind != "voice-packed":
        return tuple(numbers.randint(low, high) for _ in range(8))
    lengths: list[int] = []
    while sum(lengths) + (length := numbers.randint(low, high)) <= CAPACITY:
        lengths.append(length)
    return tuple(lengths)


def batch(lengths: tuple[int, ...], vocabulary: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels of a pack, int64 (tokens,): the last quarter of every document is trained."""
    ids = torch.randint(0, vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(number))
    trained = torch.cat([torch.arange(length) >= length - max(1, length // 4) for length in lengths])
    return ids, ids.masked_fill(~trained, IGNORED)


class Compilations:
    """Counts what Triton compiles, or loads compiled, for this process."""

    def __init__(self) -> None:
        import triton

        self.count = 0
        triton.knobs.compilation.listener = self.listen

    def listen(self, **_) -> None:
        self.count += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("kinds", nargs="?", default=",".join(RANGES), help=f"comma-separated: {', '.join(RANGES)}")
    parser.add_argument("--steps", type=int, default=100, help="steps of each kind")
    parser.add_argument("--layers", type=int, default=52)
    parser.add_argument("--tiles", action="store_true", help="our grouped products in place of torch's")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--deterministic", action="store_true", help="as stage train with deterministic: true")
    options = parser.parse_args()
    if options.deterministic:
        determinism.before_torch()
        determinism.on()
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - set(RANGES):
        raise SystemExit(f"found {', '.join(sorted(unknown))}; expected any of {', '.join(RANGES)}")
    compilations = Compilations()
    if options.tiles:
        grouped.TORCH_KERNELS = ()
    config, numbers = operations.sizes(options.layers), random.Random(7)
    model = assemble.random(config, "nf4", torch.bfloat16, "cuda")
    torch.cuda.synchronize()
    built = time.time() - started()
    adapter.attach(model, "all", RANK, ALPHA, 0)
    recompute.attach(model.train(), CAPACITY)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, fused=True)
    graphs = None if options.eager else assemble.capture(model)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.layers} layers; model built {built:.1f} s after the start of the process")
    print(f"{'lengths':12s} {'graphs':>6s} {'s':>5s} {'median ms':>9s} {'p95 ms':>7s} {'tokens/s':>8s} {'padded':>6s} {'compiled':>8s} {'GB':>5s} {'held':>5s}  loss")
    first = None
    for kind in kinds:
        plan = [draw(kind, numbers) for _ in range(options.steps)]
        began = time.perf_counter()
        if graphs:
            graphs.prepare([Documents(lengths) for lengths in plan])
        capturing, size = time.perf_counter() - began, sum(graphs.key(Documents(its)).tokens for its in plan) if graphs else sum(map(sum, plan))
        torch.cuda.reset_peak_memory_stats()
        times, compiled = [], compilations.count
        for number, lengths in enumerate(plan):
            ids, labels = batch(lengths, config["vocab_size"], number)
            count = int((labels[1:] != IGNORED).sum())
            torch.cuda.synchronize()
            began = time.perf_counter()
            loss = assemble.loss(model, ids.cuda(), labels.cuda(), Documents(lengths)) / count
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
            first = first or time.time() - started()
            if number == WARM - 1:
                compiled = compilations.count
        counted = times[WARM:] or times
        tokens = sum(map(sum, plan[WARM:] or plan))
        print(f"{kind:12s} {len(graphs.captured) if graphs else 0:6d} {capturing:5.1f} {statistics.median(counted) * 1e3:9.0f} {sorted(counted)[int(len(counted) * 0.95)] * 1e3:7.0f} "
              f"{tokens / sum(counted):8,.0f} {1 - sum(map(sum, plan)) / size:6.1%} {compilations.count - compiled:8d} {torch.cuda.max_memory_allocated() / 1e9:5.1f} "
              f"{torch.cuda.max_memory_reserved() / 1e9:5.1f}  {loss.item():.3f}", flush=True)
    print(f"first step {first:.1f} s after the start of the process, the first row's graphs included; GB: the most allocated, held: reserved by torch")


if __name__ == "__main__":
    main()
