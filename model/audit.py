"""Audits a checkpoint that a stage reads or writes: every tensor against what the config asks for.

Loaders do not check this. vLLM looks for missing tensors in unquantised checkpoints only; a missing scale is
uninitialised memory there. The audit reads headers and scales, and compares unquantised tensors with the
source if there is one. model/checkpoint_audit.py audits checkpoints of any origin with the same checks.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from model import faults, layouts
from model.families import registry
from model.families.family import Spec
from model.faults import Finding, not_finite, unreadable
from model.weights import quant_config
from model.weights.checkpoint import Checkpoint, tensor_bytes
from model.weights.paths import CheckpointError
from model.weights.quant_config import FILE as QUANT

__all__ = ["QUANT", "UNREADABLE", "Finding", "bf16", "digest", "not_finite", "nvfp4", "packed_modules"]

UNREADABLE = (CheckpointError, ValueError, KeyError, OSError)


def bf16(folder: Path, values: bool = True) -> list[Finding]:
    """Findings about an unquantised checkpoint; `values` also reads every tensor for NaN and infinity."""
    try:
        checkpoint = Checkpoint(folder)
        expected = registry.of(checkpoint.config).tensors(checkpoint.config)
    except UNREADABLE as error:
        return [unreadable(folder.name, error)]
    if (folder / QUANT).exists() or any(e.dtype == "U8" for e in checkpoint.entries.values()):
        return [
            Finding(
                folder.name,
                "an NVFP4 checkpoint",
                "a BF16 one",
                "Packed 4-bit weights cannot be trained or merged into: name the BF16 repository it was made"
                " from.",
            )
        ]
    findings = list(faults.structure(checkpoint, expected))
    if values and not findings:
        findings += not_finite(checkpoint, list(checkpoint.entries))
    return findings


def nvfp4(folder: Path, layout: str, source: Path | None = None, weight_only: bool = False) -> list[Finding]:
    """Findings about a checkpoint quantised in `layout`. With `source`, unquantised tensors must equal the
    source's bit for bit.
    """
    try:
        checkpoint = Checkpoint(folder)
        config, family = checkpoint.config, registry.of(checkpoint.config)
        configs = quant_config.read(folder, config)
        if not any(c.file == QUANT for c in configs):
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
    findings = [
        *faults.structure(checkpoint, expected),
        *faults.settings(configs),
        *faults.excludes(checkpoint, family.excludable(config), packed_modules(checkpoint), configs[0]),
        *faults.scales(checkpoint, expected),
    ]
    if original:
        unquantised = [n for n in plain if expected[n].dtype != "U8"]
        findings += faults.unchanged(checkpoint, original, unquantised, family.never_cast)
    return findings


def digest(values: dict[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors, in the order of their names."""
    sha256 = hashlib.sha256()
    for name in sorted(values):
        sha256.update(f"{name}\n".encode())
        sha256.update(tensor_bytes(values[name]))
    return sha256.hexdigest()


def packed_modules(checkpoint: Checkpoint) -> set[str]:
    """Modules that are quantised in the files: their weight is packed, or they have a scale."""
    packed = {
        n.removesuffix(".weight")
        for n, e in checkpoint.entries.items()
        if n.endswith(".weight") and e.dtype == "U8"
    }
    return packed | {
        n.rpartition(".")[0] for n in checkpoint.entries if n.rpartition(".")[2] in layouts.PARTS
    }
