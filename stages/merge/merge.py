"""Merge: W + scale * B A in float32, rounded once to the source's dtype, shard by shard and tensor by tensor.

Names, dtypes, shard layout, config, tokenizer and template are the source's own; tensors that the adapter does not name
are copied byte for byte. What comes out is read back and proven before it is handed on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from nemotron import audit
from nemotron.checkpoint import Checkpoint, CheckpointError, Slot, Work, write
from nemotron.lora import Adapter, AdapterError, summed
from stages import job
from stages.job import Job, StageError
from stages.merge import proof


def run(its: Job) -> None:
    base_folder = its.inputs["base"]
    if faults := audit.bf16(base_folder, values=False):
        raise StageError(f"{faults[0].subject}: {faults[0].found}", faults[0].expected, faults[0].remedy)
    try:
        base = Checkpoint(base_folder)
        adapter = Adapter(its.inputs["train"] / "adapter", base)
    except (CheckpointError, AdapterError) as error:
        raise StageError(str(error), "a BF16 checkpoint and an adapter made on it", "Train again on this base.") from error
    merged = stream(base, adapter, its.output)
    facts = proof.files(base, Checkpoint(its.output), adapter, merged, its.params["control"])
    if its.params["proof_tokens"] and not its.params["control"]:  # equal bytes have an equal forward
        facts |= proof.forward(base, adapter, Checkpoint(its.output), its.inputs["data"] / "train.jsonl", its.params, its.device)
    (its.output / "merge.json").write_text(json.dumps({"rank": adapter.rank, "scale": adapter.scale, **facts}, indent=2) + "\n")


def stream(base: Checkpoint, adapter: Adapter, output: Path) -> dict[str, int]:
    """Writes the merged checkpoint; returns the number of changed elements of every merged tensor."""
    changed: dict[str, list[int]] = {}
    done = 0

    def produce(slot: Slot) -> Iterator[Work]:
        nonlocal done
        done += slot.bytes
        job.progress(done / 1e9, base.bytes / 1e9, "GB", slot.name)
        return merged(slot.name) if slot.name in adapter.pairs else base.pieces(slot.name)

    def merged(name: str) -> Iterator[Work]:
        a, b = adapter.factors(name)
        return (partial(piece, name, a, b, *span) for span in base.spans(name))

    def piece(name: str, a: torch.Tensor, b: torch.Tensor, first: int, count: int) -> torch.Tensor:
        before = base.rows(name, first, count)
        after = summed(before, a, b[first : first + count], adapter.scale)
        changed.setdefault(name, []).append(int(torch.count_nonzero(after.view(torch.int16) ^ before.view(torch.int16))))
        return after

    for file in base.files:
        slots = [Slot(name, base.entries[name].dtype, base.entries[name].shape) for name in base.in_file(file)]
        write(output / file, slots, produce, base.metadata[file])
    for path in sorted(base.folder.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name != "manifest.json":
            shutil.copyfile(path, output / path.name)
    return {name: sum(counts) for name, counts in changed.items()}
