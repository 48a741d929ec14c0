"""Quantise: writes BF16 shards as NVFP4 shards, one tensor at a time, then audits every tensor that was
written.

Calibration, packing and writing are our own code. Packing is bit-exact with ModelOpt's
(model/weights/nvfp4.py). With `engine: modelopt` ModelOpt calibrates. ModelOpt's exporter is not used on
purpose: version 0.47 writes control characters into this architecture's names and calls save_pretrained.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Iterable
from functools import partial
from threading import Lock
from typing import Any

import torch

from model import audit, layouts
from model.families.family import Spec
from model.weights import nvfp4, quant_config
from model.weights.checkpoint import INDEX, Checkpoint, Slot, Work, files_beside, write, write_index
from model.weights.paths import shard
from stages import dataset, job
from stages.job import Job, StageError
from stages.quantize import calibrate, fidelity
from stages.quantize.parameters import Parameters


def run(task: Job) -> None:
    """Writes the NVFP4 checkpoint and `audit.json`. Raises StageError if the audit finds a fault."""
    source, params = Checkpoint(task.inputs["merge"]), task.parameters(Parameters)
    layout, weight_only = params.layout, params.format == "w4a16"
    modules = layouts.quantised(source.config, layout)
    maxima: dict[str, torch.Tensor] = {}
    calibration: dict[str, Any] = {}
    if not weight_only:
        rows = calibrate.conversations(
            task.inputs["data"] / "train.jsonl", params.calibration_rows, params.calibration_tokens
        )
        maxima, idle = activation_maxima(source, layout, rows, params.engine, task.device)
        calibration = {
            "engine": params.engine,
            "conversations": len(rows),
            "tokens": sum(map(len, rows)),
            "idle": idle,
            "input_scales": audit.digest(
                {f"{module}.input_scale": nvfp4.global_scale(value) for module, value in maxima.items()}
            ),
        }
        if idle:
            job.warning(
                f"no calibration token reached {len(idle)} projections of experts, first {idle[0]}: they take"
                " their layer's largest scale",
                "Raise calibration_rows, or give conversations that look like those it will serve",
            )
    stream(source, modules, maxima, task)
    kv_cache = None if params.kv_cache == "none" else params.kv_cache
    quant_config.write(
        task.output,
        layouts.hf_quant_config(
            source.config, layout, kv_cache, importlib.metadata.version("nvidia-modelopt"), weight_only
        ),
    )
    findings = audit.nvfp4(task.output, layout, source.folder, weight_only)
    quantised = Checkpoint(task.output)
    report = {
        "layout": layout,
        "format": params.format,
        "scales": params.scales,
        "quantised": len(modules),
        "tensors": len(quantised.entries),
        "bytes": quantised.bytes,
        "source_bytes": source.bytes,
        "calibration": calibration,
        "findings": [f.as_json() for f in findings],
    }
    if not findings and params.fidelity_tokens:
        report |= fidelity_report(source, quantised, task)
    (task.output / "audit.json").write_text(json.dumps(report, indent=2) + "\n")
    if findings:
        listed = "; ".join(str(f) for f in findings[:5])
        raise StageError(
            f"{len(findings)} faults in the quantised checkpoint: {listed}",
            "none",
            "Nothing was handed on. Report it with this log.",
        )


def fidelity_report(source: Checkpoint, quantised: Checkpoint, task: Job) -> dict[str, Any]:
    """`{"fidelity": figures}` of the quantised model on held-out conversations. Empty, with a warning, if
    stage data held none out.
    """
    path = task.inputs["data"] / "eval.jsonl"
    if not dataset.count(path):
        job.warning(
            "no held-out conversation: the quantised model's loss, KL and error by layer were not measured",
            "Set eval_share above 0 in stage data, or fidelity_tokens: 0 to leave the comparison out",
        )
        return {}
    rows = fidelity.held_out_rows(path, task.parameters(Parameters).fidelity_tokens)
    figures = fidelity.measure(source, quantised, rows, task.device)
    job.metric("held-out loss before", figures["loss"]["source"])
    job.metric("held-out loss in NVFP4", figures["loss"]["quantised"])
    job.metric("KL to the source", figures["kl"])
    return {"fidelity": figures}


def activation_maxima(
    source: Checkpoint, layout: str, rows: list[torch.Tensor], engine: str, device: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Hub name -> largest absolute input, float32 scalar, of every quantised linear; and the names of idle
    experts.
    """
    if engine == "own":
        return calibrate.maxima(source, layout, rows, device)
    from stages.quantize import reference  # ModelOpt takes seconds to import

    return reference.maxima(source.folder, source.config, layout, rows, device), []


class Packing:
    """One matrix that is being quantised. The first requested part packs it; the last one frees it."""

    def __init__(
        self, source: Checkpoint, module: str, input_scale: torch.Tensor | None, search: str, device: str
    ):
        self.source = source
        self.module = module
        self.input_scale = input_scale
        self.search = search
        self.device = device
        self._lock = Lock()
        self._parts: dict[str, Any] | None = None

    def part(self, name: str) -> torch.Tensor:
        """The part `name` of the packed matrix, such as `weight_scale`. Each part can be taken once."""
        with self._lock:
            if self._parts is None:
                packed = nvfp4.pack(self.source.tensor(f"{self.module}.weight").to(self.device), self.search)
                self._parts = {**vars(packed), "input_scale": self.input_scale}
            part: torch.Tensor = self._parts.pop(name)
            return part


def stream(source: Checkpoint, modules: list[str], maxima: dict[str, torch.Tensor], task: Job) -> None:
    """Writes the shards with the linears `modules` quantised, one file per source file, and copies all other
    files.

    If `maxima` is empty, only weights are quantised and inputs have no scale.
    """
    output, packed = task.output, set(modules)
    params = task.parameters(Parameters)
    specs = layouts.tensors(
        source.config,
        params.layout,
        {n: Spec(e.shape, e.dtype) for n, e in source.entries.items()},
        not maxima,
    )
    done = 0
    written: list[tuple[str, list[Slot]]] = []
    current: Packing

    def produce(slot: Slot) -> Iterable[Work]:
        nonlocal done, current
        module, _, part = slot.name.rpartition(".")
        if part == "weight" or module not in packed:
            done += source.entries[slot.name].bytes
            job.progress(done / 1e9, source.bytes / 1e9, "GB", "writing")
        if module not in packed:
            return source.pieces(slot.name)
        if part == "weight":
            current = Packing(
                source,
                module,
                nvfp4.global_scale(maxima[module]) if maxima else None,
                params.scales,
                task.device,
            )
        return [partial(current.part, part)]

    beside = files_beside(source.folder)  # refuses links before anything is written
    for file in source.files:
        slots = []
        for name in source.names_in_file(file):
            module = name.removesuffix(".weight")
            parts = layouts.PARTS if module in packed and name.endswith(".weight") else ()
            slots += [
                Slot(n, specs[n].dtype, specs[n].shape)
                for n in (name, *(f"{module}.{part}" for part in parts))
                if n in specs
            ]
        write(shard(output, file), slots, produce, source.metadata[file])
        written.append((file, slots))
    for path in beside:
        if path.name != INDEX:
            shutil.copyfile(path, output / path.name)
    # A single shard can have an index too (model-00001-of-00001). Without the index no loader finds it.
    if (source.folder / INDEX).exists():
        write_index(output, written)
