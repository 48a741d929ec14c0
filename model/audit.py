"""Every tensor of a checkpoint that a stage takes or makes, against what its config says it has to be.

Loaders do not look: vLLM checks for missing tensors in unquantised checkpoints only, and a scale that is
missing is uninitialised memory there. The audit reads headers and scales, and what has to be equal to a
source where one is given. Checkpoints of any origin are audited by model/checkpoint_audit.py, with the
same checks.
"""

from __future__ import annotations

from pathlib import Path

from model import faults, layouts
from model.families import registry
from model.families.family import Spec
from model.faults import Finding, not_finite, unreadable
from model.weights import quant_config
from model.weights.checkpoint import Checkpoint, CheckpointError
from model.weights.quant_config import FILE as QUANT

__all__ = ["QUANT", "UNREADABLE", "Finding", "bf16", "not_finite", "nvfp4", "packed_modules"]

UNREADABLE = (CheckpointError, ValueError, KeyError, OSError)


def bf16(folder: Path, values: bool = True) -> list[Finding]:
    """Findings about an unquantised checkpoint; `values` also reads every tensor for NaN and infinity."""
    try:
        its = Checkpoint(folder)
        expected = registry.of(its.config).tensors(its.config)
    except UNREADABLE as error:
        return [unreadable(folder.name, error)]
    if (folder / QUANT).exists() or any(e.dtype == "U8" for e in its.entries.values()):
        return [
            Finding(
                folder.name,
                "an NVFP4 checkpoint",
                "a BF16 one",
                "Packed 4-bit weights cannot be trained or merged into: name the BF16 repository it was made"
                " from.",
            )
        ]
    found = list(faults.structure(its, expected))
    if values and not found:
        found += not_finite(its, list(its.entries))
    return found


def nvfp4(folder: Path, layout: str, source: Path | None = None, weight_only: bool = False) -> list[Finding]:
    """Findings about a checkpoint quantised in `layout`; with `source` also what has to be equal to it bit
    for bit.
    """
    try:
        its = Checkpoint(folder)
        config, family = its.config, registry.of(its.config)
        said = quant_config.read(folder, config)
        if not any(c.file == QUANT for c in said):
            raise CheckpointError(f"{folder.name} has no {QUANT}")
        original = Checkpoint(source) if source else None
        plain = (
            {n: Spec(e.shape, e.dtype) for n, e in original.entries.items()}
            if original
            else family.tensors(config)
        )
        expected = layouts.tensors(config, layout, plain, weight_only)
    except UNREADABLE as error:
        return [unreadable(folder.name, error)]
    found = [
        *faults.structure(its, expected),
        *faults.settings(said),
        *faults.excludes(its, family.listed(config), packed_modules(its), said[0]),
        *faults.scales(its),
    ]
    if original:
        kept = [n for n in plain if expected[n].dtype != "U8"]
        found += faults.unchanged(its, original, kept, family.never_cast)
    return found


def packed_modules(its: Checkpoint) -> set[str]:
    """Modules that are quantised in the files: packed weights, or any scale."""
    packed = {
        n.removesuffix(".weight") for n, e in its.entries.items() if n.endswith(".weight") and e.dtype == "U8"
    }
    return packed | {n.rpartition(".")[0] for n in its.entries if n.rpartition(".")[2] in layouts.PARTS}
