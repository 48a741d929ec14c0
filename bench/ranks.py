"""One optimizer step of 8 x 2,048 tokens shared by several GPUs, with the base whole on each and with the base sharded.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m bench.ranks [LAYERS]
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time

import torch
import torch.distributed as distributed
from torch import nn

from bench import operations
from bench.lengths import conversations
from bench.ours import ALPHA, RANK
from nemotron import adapter, assemble, recompute
from nemotron.documents import Documents
from nemotron.shards import Shards
from stages.train.ranks import join


def measure(config: dict, form: str, shards: Shards, ranks, device: torch.device, steps: int = 5) -> dict:
    """Milliseconds, tokens a second and this GPU's peaks, of the median of `steps` after two."""
    torch.cuda.reset_peak_memory_stats()
    model = assemble.random(config, form, torch.bfloat16, str(device), shards=shards)
    building = torch.cuda.max_memory_allocated()
    adapter.attach(model, "all", RANK, ALPHA, 0)
    recompute.attach(model.train())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, fused=True)
    whole = conversations((2048,) * 8, config["vocab_size"], 7, device)
    count = sum(its.trained for its in whole)
    own = whole[ranks.rank * 8 // ranks.world : (ranks.rank + 1) * 8 // ranks.world]
    ids, labels = torch.cat([its.ids for its in own]), torch.cat([its.labels for its in own])
    documents = Documents(tuple(len(its.ids) for its in own))
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(2 + steps):
        ranks.wait()
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss = assemble.loss(model, ids, labels, documents) / count
        loss.backward()
        total = loss.detach()
        ranks.sum([total, *(p.grad for p in parameters)])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    milliseconds = statistics.median(times[2:])
    return {"ms": milliseconds, "tokens": 8 * 2048 / milliseconds * 1e3, "peak": torch.cuda.max_memory_allocated() / 1e9, "building": building / 1e9, "loss": total.item()}


def main(layers: int = 52) -> None:
    ranks = join("cuda")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if ranks.first:
        print(f"{ranks.world} x {torch.cuda.get_device_name()}, {layers} layers, 8 x 2048 tokens, LoRA of rank {RANK} on all\n"
              f"{'base':20s} {'ms/step':>8s} {'tokens/s':>9s} {'peak GB':>8s} {'building':>9s}  loss", flush=True)
    for form in ("nf4", "nvfp4"):
        for shards in (Shards(), Shards(ranks.rank, ranks.world)):
            found = measure(operations.sizes(layers), form, shards, ranks, device)
            if ranks.first:
                print(f"{form + (', sharded' if shards.count > 1 else ', whole'):20s} {found['ms']:8,.0f} {found['tokens']:9,.0f} {found['peak']:8.1f} {found['building']:9.1f}  {found['loss']:.5f}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
