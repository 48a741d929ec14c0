"""Writes a small model that was made here as a checkpoint in hub layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.families import registry
from model.families.nemotron_h.tiny import config, delicate_biases
from model.weights.checkpoint import Slot, shards, write, write_index

__all__ = ["config", "delicate_biases", "save"]

SHARD_BYTES = 1_000_000  # small, so that even a tiny model has several shards, as a real one


def save(model: nn.Module, description: dict[str, Any], folder: Path) -> None:
    """Writes config, generation config and shards in hub layout: one tensor per expert, each in its published
    dtype.
    """
    family = registry.of(description)
    indices = {linear.weight: linear.index for linear in family.linears(description)}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    slots = [Slot(name, spec.dtype, spec.shape) for name, spec in family.tensors(description).items()]
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}

    def produce(slot: Slot) -> torch.Tensor:
        tensor = tensors[family.native(slot.name)].data
        if (index := indices.get(slot.name)) is not None:
            tensor = tensor[index]
        return tensor.to(dtypes[slot.dtype])

    layout = shards(slots, SHARD_BYTES)
    for name, group in layout:
        write(folder / name, group, produce)
    write_index(folder, layout)
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    generation = {
        "_from_model_config": True,
        "bos_token_id": 1,
        "do_sample": True,
        "eos_token_id": [2, 11],
        "pad_token_id": 0,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
