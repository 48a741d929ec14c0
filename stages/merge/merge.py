"""Merge: W + scale * B A in float32, as PEFT computes it, rounded once to the source's dtype, tensor by
tensor.

Names, dtypes, shards, config, tokenizer and template are those of the source. Tensors that the adapter does
not name are copied byte for byte. The output is read back and proven before the stage ends.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from model import audit
from model.lora import Adapter, AdapterError, Change
from model.weights.checkpoint import Checkpoint, Slot, Work, files_beside, write
from model.weights.paths import CheckpointError, shard
from stages import job
from stages.job import Job, StageError
from stages.merge import patterns, proof
from stages.merge.parameters import Parameters
from stages.merge.peft_reading import PeftReading


def run(task: Job) -> None:
    """Writes the merged checkpoint and `merge.json`. Raises StageError if base or adapter cannot be used, or
    a proof fails.
    """
    base_folder, params = task.inputs["base"], task.parameters(Parameters)
    if faults := audit.bf16(base_folder, values=False):
        raise StageError(f"{faults[0].subject}: {faults[0].found}", faults[0].expected, faults[0].remedy)
    try:
        base = Checkpoint(base_folder)
        folder = task.inputs["train"] / "adapter"
        patterns.check(folder, base.config)
        adapter = Adapter(folder, base)
        reading = PeftReading(adapter.folder, adapter.tensors, base.config, task.device)
        check_names(adapter, reading)
        changed = stream(base, adapter, task.output)
    except (AdapterError, CheckpointError) as error:
        raise StageError(error.found, error.expected, error.remedy) from error
    merged = Checkpoint(task.output)
    facts = {
        "rank": adapter.rank,
        "scale": adapter.scale,
        **proof.check_files(base, merged, adapter, changed, params.control),
    }
    if not params.control:  # a control's bytes are equal, so its forward pass is too
        if params.proof_tokens:
            forward, agreement = proof.check_forward(
                base, adapter, merged, reading, task.inputs["data"] / "train.jsonl", params, task.device
            )
        else:
            forward, agreement = {}, proof.check_tensors(base, merged, adapter, reading)
        facts |= forward | {
            "compared_with_peft": {
                "version": reading.version,
                "layers": changed_layers(adapter),
                **dataclasses.asdict(agreement),
            }
        }
    (task.output / "merge.json").write_text(json.dumps(facts, indent=2) + "\n")


def check_names(adapter: Adapter, reading: PeftReading) -> None:
    """Raises StageError unless PEFT and model/lora.py find changes of the same tensors. Warns of tensors that
    the configuration names and the adapter does not store.
    """
    if one_sided := sorted(adapter.pairs.keys() ^ reading.wrappers.keys()):
        reader = "model/lora.py" if one_sided[0] in adapter.pairs else f"PEFT {reading.version}"
        raise StageError(
            f"{one_sided[0]} is changed by the adapter as {reader} reads it only ({len(one_sided)} such"
            " tensors)",
            "both to read changes of the same tensors",
            "Report it with adapter_config.json and the names of the adapter's tensors.",
        )
    if reading.absent:
        job.warning(
            f"adapter_config.json names {len(reading.absent)} tensors for which the adapter stores nothing, "
            f"first {reading.absent[0]}: they stay the base's",
            "If they were trained, copy the adapter again.",
        )


def changed_layers(adapter: Adapter) -> list[str]:
    """The numbers of the layers that the adapter changes, and the names of changed linears outside layers."""
    places = {name: adapter.family.layer(name) for name in adapter.pairs}
    return [
        *map(str, sorted({number for number in places.values() if number is not None})),
        *(name.removesuffix(".weight") for name, number in places.items() if number is None),
    ]


def stream(base: Checkpoint, adapter: Adapter, output: Path) -> dict[str, int]:
    """Writes the merged checkpoint. Returns the number of changed elements of every merged tensor."""
    changed: dict[str, list[int]] = {}
    done = 0

    def produce(slot: Slot) -> Iterator[Work]:
        nonlocal done
        done += slot.bytes
        job.progress(done / 1e9, base.bytes / 1e9, "GB", slot.name)
        return merged_pieces(slot.name) if slot.name in adapter.pairs else base.pieces(slot.name)

    def merged_pieces(name: str) -> Iterator[Work]:
        change = adapter.change(name)
        return (partial(merged_rows, name, change, *span) for span in base.spans(name))

    def merged_rows(name: str, change: Change, first: int, count: int) -> torch.Tensor:
        before = base.rows(name, first, count)
        after = change.rows(first, count).merged(before)
        changed.setdefault(name, []).append(
            int(torch.count_nonzero(after.view(torch.int16) ^ before.view(torch.int16)))
        )
        return after

    beside = files_beside(base.folder)  # refuses links before anything is written
    for file in base.files:
        slots = [
            Slot(name, base.entries[name].dtype, base.entries[name].shape)
            for name in base.names_in_file(file)
        ]
        write(shard(output, file), slots, produce, base.metadata[file])
    for path in beside:
        shutil.copyfile(path, output / path.name)
    return {name: sum(counts) for name, counts in changed.items()}
