"""Small checkpoints in NVFP4, for the tests of audits."""

import json

import torch

from model import layouts
from model.weights import nvfp4, quant_config
from model.weights.checkpoint import NAMES, Checkpoint, Slot, shards, write, write_index


def tensors(folder):
    its = Checkpoint(folder)
    return {name: its.tensor(name) for name in its.entries}


def written(folder, config, values, quant=None):
    folder.mkdir()
    slots = [Slot(name, NAMES[value.dtype], tuple(value.shape)) for name, value in values.items()]
    files = shards(slots, 300_000)
    for file, group in files:
        write(folder / file, group, lambda slot: values[slot.name])
    write_index(folder, files)
    (folder / "config.json").write_text(json.dumps(config))
    if quant:
        quant_config.write(folder, quant)
    return folder


def quantised(base, folder, chosen, change=lambda values: None, weight_only=False, search="nearest"):
    """`base` in NVFP4, with its tensors changed before they are written. Like the export of a stranger, it
    does not record `search`.
    """
    config, values = Checkpoint(base).config, tensors(base)
    for name in layouts.quantised(config, chosen):
        packed = nvfp4.pack(values[f"{name}.weight"], search)
        values |= {
            f"{name}.weight": packed.weight,
            f"{name}.weight_scale": packed.weight_scale,
            f"{name}.weight_scale_2": packed.weight_scale_2,
        }
        if not weight_only:
            values[f"{name}.input_scale"] = torch.tensor(0.01)
    change(values)
    return written(folder, config, values, layouts.hf_quant_config(config, chosen, "FP8", "0", weight_only))
