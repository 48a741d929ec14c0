"""Quantise: BF16 shards to NVFP4 shards, one tensor at a time, then an audit of every tensor that was written.

ModelOpt calibrates; packing and writing are ours (nemotron/nvfp4.py, bit-exact with ModelOpt's own packing). Its exporter is
left out on purpose: at 0.47 it writes control characters into this architecture's names and goes through save_pretrained.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from nemotron import audit, layout, nvfp4
from nemotron.checkpoint import INDEX, Checkpoint, Slot, write, write_index
from nemotron.names import Spec
from stages import job
from stages.job import Job, StageError
from stages.quantize import calibrate


def run(its: Job) -> None:
    source = Checkpoint(its.inputs["merge"])
    chosen = its.params["layout"]
    batches = calibrate.conversations(its.inputs["data"] / "train.jsonl", its.params["calibration_rows"], its.params["calibration_tokens"])
    maxima = calibrate.maxima(source.folder, source.config, chosen, batches, its.device)
    stream(source, maxima, chosen, its.output, its.device)
    kv_cache = None if its.params["kv_cache"] == "none" else its.params["kv_cache"]
    settings = layout.hf_quant_config(source.config, chosen, kv_cache, calibrate.PRODUCER)
    (its.output / audit.QUANT).write_text(json.dumps(settings, indent=4) + "\n")
    findings = audit.nvfp4(its.output, chosen, source.folder)
    report = {
        "layout": chosen, "quantised": len(maxima), "tensors": len(Checkpoint(its.output).entries),
        "bytes": Checkpoint(its.output).bytes, "source_bytes": source.bytes,
        "calibration": {"conversations": len(batches), "tokens": sum(b.numel() for b in batches)},
        "findings": [f.as_json() for f in findings],
    }
    (its.output / "audit.json").write_text(json.dumps(report, indent=2) + "\n")
    if findings:
        listed = "; ".join(str(f) for f in findings[:5])
        raise StageError(f"{len(findings)} faults in the quantised checkpoint: {listed}", "none", "Nothing was handed on. Report it with this log.")


def stream(source: Checkpoint, maxima: dict[str, torch.Tensor], chosen: str, output: Path, device: str) -> None:
    """Writes the quantised shards, a file for each of the source's, and everything beside them."""
    specs = layout.tensors(source.config, chosen, {n: Spec(e.shape, e.dtype) for n, e in source.entries.items()})
    done = 0
    written = []
    parts: dict[str, torch.Tensor] = {}

    def produce(slot: Slot) -> torch.Tensor:
        nonlocal done
        module, _, part = slot.name.rpartition(".")
        if module not in maxima:
            done += slot.bytes
            job.progress(done / 1e9, source.bytes / 1e9, "GB", "writing")
            return source.tensor(slot.name)
        if part == "weight":
            weight = source.tensor(slot.name)
            done += source.entries[slot.name].bytes
            packed = nvfp4.pack(weight.to(device))
            parts.update(weight_scale=packed.weight_scale, weight_scale_2=packed.weight_scale_2, input_scale=nvfp4.global_scale(maxima[module]))
            job.progress(done / 1e9, source.bytes / 1e9, "GB", "writing")
            return packed.weight
        return parts.pop(part)

    for file in source.files:
        slots = []
        for name in source.in_file(file):
            module = name.removesuffix(".weight")
            new = [name, *(f"{module}.{part}" for part in layout.PARTS)] if module in maxima and name.endswith(".weight") else [name]
            slots += [Slot(n, specs[n].dtype, specs[n].shape) for n in new]
        write(output / file, slots, produce, source.metadata[file])
        written.append((file, slots))
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("manifest.json", "merge.json", INDEX):
            shutil.copyfile(path, output / path.name)
    # A single shard can have an index too (model-00001-of-00001), and is found by nothing else.
    if (source.folder / INDEX).exists():
        write_index(output, written)
