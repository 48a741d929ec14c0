"""Merge: W + scale * B A in float32, rounded once to the source's dtype, shard by shard and tensor by tensor.

Names, dtypes, shard layout, config, tokenizer and template are the source's own; tensors that the adapter does not name
are copied byte for byte. What comes out is read back and proven before it is handed on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from nemotron import audit
from nemotron.checkpoint import DTYPES, Checkpoint, CheckpointError, Slot, write
from nemotron.lora import Adapter, AdapterError
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
    facts = proof.files(base, Checkpoint(its.output), adapter, merged)
    if its.params["proof_tokens"]:
        facts |= proof.forward(base_folder, its.inputs["train"] / "adapter", its.output, its.inputs["data"] / "train.jsonl", its.params, its.device)
    (its.output / "merge.json").write_text(json.dumps({"rank": adapter.rank, "scale": adapter.scale, **facts}, indent=2) + "\n")


def stream(base: Checkpoint, adapter: Adapter, output: Path) -> dict[str, int]:
    """Writes the merged checkpoint; returns the number of changed elements of every merged tensor."""
    changed: dict[str, int] = {}
    done = 0

    def produce(slot: Slot) -> bytearray | torch.Tensor:
        nonlocal done
        if slot.name not in adapter.pairs:
            made: bytearray | torch.Tensor = base.raw(slot.name)
        else:
            before = base.tensor(slot.name)
            made = (before.float() + adapter.delta(slot.name)).to(DTYPES[slot.dtype])
            changed[slot.name] = int((made != before).sum())
        done += slot.bytes
        job.progress(done / 1e9, base.bytes / 1e9, "GB", slot.name)
        return made

    for file in base.files:
        slots = [Slot(name, base.entries[name].dtype, base.entries[name].shape) for name in base.in_file(file)]
        write(output / file, slots, produce, base.metadata[file])
    for path in sorted(base.folder.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name != "manifest.json":
            shutil.copyfile(path, output / path.name)
    return changed
