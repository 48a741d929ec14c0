"""Every tensor of a checkpoint against what its config says it has to be.

Loaders do not look: vLLM checks for missing tensors in unquantised checkpoints only, and a scale that is missing is
uninitialised memory there. The audit reads headers and scales, and small float32 buffers where the source is given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nemotron import layout as layouts
from nemotron import names
from nemotron.checkpoint import DTYPES, Checkpoint, CheckpointError
from nemotron.names import Spec

QUANT = "hf_quant_config.json"


@dataclass(frozen=True)
class Finding:
    """One fault: which tensor or file, what is there, what should be, what to do."""

    subject: str
    found: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.subject}: found {self.found}; expected {self.expected}. {self.remedy}"

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def bf16(folder: Path, values: bool = True) -> list[Finding]:
    """Findings about an unquantised checkpoint; `values` also reads every tensor for NaN and infinity."""
    try:
        checkpoint = Checkpoint(folder)
        expected = names.tensors(checkpoint.config)
    except (CheckpointError, ValueError, KeyError, OSError) as error:
        return [unreadable(folder, error)]
    if (folder / QUANT).exists() or any(e.dtype == "U8" for e in checkpoint.entries.values()):
        return [Finding(folder.name, "an NVFP4 checkpoint", "a BF16 one", "Packed 4-bit weights cannot be trained or merged into: name the BF16 repository it was made from.")]
    found = list(structure(checkpoint, expected))
    if values and not found:
        found += not_finite(checkpoint, list(checkpoint.entries))
    return found


def nvfp4(folder: Path, layout: str, source: Path | None = None, weight_only: bool = False) -> list[Finding]:
    """Findings about a quantised checkpoint in `layout`; with `source` also what has to be equal to it bit for bit."""
    try:
        checkpoint = Checkpoint(folder)
        config = checkpoint.config
        quant = json.loads((folder / QUANT).read_text())["quantization"]
        original = Checkpoint(source) if source else None
        specs = {n: Spec(e.shape, e.dtype) for n, e in original.entries.items()} if original else None
        expected = layouts.tensors(config, layout, specs, weight_only)
    except (CheckpointError, ValueError, KeyError, OSError) as error:
        return [unreadable(folder, error)]
    found = [*structure(checkpoint, expected), *excludes(checkpoint, config, quant)]
    found += scales(checkpoint)
    if original:
        found += unchanged(checkpoint, original, expected)
    return found


def unreadable(folder: Path, error: Exception) -> Finding:
    return Finding(folder.name, f"{type(error).__name__}: {error}", "a whole checkpoint with its config", "Copy or download it again.")


def structure(checkpoint: Checkpoint, expected: dict[str, Spec]) -> Iterator[Finding]:
    for name, spec in expected.items():
        entry = checkpoint.entries.get(name)
        if entry is None:
            yield Finding(name, "no such tensor", f"{spec.dtype} {spec.shape}", "The checkpoint is incomplete: make or download it again.")
        elif (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            yield Finding(name, f"{entry.dtype} {entry.shape}", f"{spec.dtype} {spec.shape}", "It belongs to another model or was written wrongly.")
    for name in checkpoint.entries.keys() - expected.keys():
        shown = name if name.isprintable() else repr(name)
        yield Finding(shown, "a tensor that the config has no place for", "only the model's own tensors", "A loader would stop at it or ignore it: remove it, or mend its name.")


def excludes(checkpoint: Checkpoint, config: dict, quant: dict) -> Iterator[Finding]:
    """The exclude list against the files, in both directions."""
    listed = quant.get("exclude_modules", [])
    for name in listed:
        if not name.isprintable():
            yield Finding(QUANT, f"the exclude {name!r}", "no control character", "vLLM would match nothing with it and quantise that layer: write the name out.")
        elif f"{name}.weight" not in checkpoint.entries:
            yield Finding(QUANT, f"the exclude {name}, which is no module of this checkpoint", "names of modules", "Mend or remove it.")
        elif f"{name}.weight_scale" in checkpoint.entries:
            yield Finding(QUANT, f"the exclude {name}, which is quantised in the files", "excluded or quantised, not both", "Take it off the list.")
    for name in names.tensors(config):
        module = name.removesuffix(".weight")
        linear = module.endswith(("_proj", ".conv1d")) or module == "lm_head"
        if linear and f"{module}.weight_scale" not in checkpoint.entries and module not in listed:
            yield Finding(QUANT, f"no exclude for {module}, which is not quantised", "an exclude for it", "vLLM would read it as NVFP4: add it.")


def scales(checkpoint: Checkpoint) -> Iterator[Finding]:
    for name, entry in checkpoint.entries.items():
        if not name.endswith(layouts.PARTS) or entry.dtype not in DTYPES:
            continue
        values = checkpoint.tensor(name).float()
        if not torch.isfinite(values).all():
            yield Finding(name, "NaN or infinity", "finite scales", "Quantise again; if it stays, the calibration met such values.")
        elif not (values > 0).all():
            yield Finding(name, f"{int((values <= 0).sum())} scales that are not positive", "positive scales", "Quantise again; a zero scale erases its group.")


def unchanged(checkpoint: Checkpoint, source: Checkpoint, expected: dict[str, Spec]) -> Iterator[Finding]:
    """Router weights, correction biases and every other tensor that is not quantised: equal bits."""
    for name, entry in source.entries.items():
        other = checkpoint.entries.get(name)
        if other and (other.dtype, other.shape) == (entry.dtype, entry.shape) and expected[name].dtype != "U8":
            if not checkpoint.same(name, source):
                yield Finding(name, "other values than in the source", "the same bits", "It must be copied, not cast: quantise again.")


def not_finite(checkpoint: Checkpoint, wanted: list[str]) -> Iterator[Finding]:
    for name in wanted:
        tensor = checkpoint.tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            yield Finding(name, "NaN or infinity", "finite values", "The checkpoint is damaged or its training diverged: do not build on it.")
