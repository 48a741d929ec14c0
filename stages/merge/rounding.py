"""Whether a merged tensor is what PEFT makes of the weight, rounded once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stages.job import StageError

# Two orders of the same float32 sum differ by about rank * 2**-24 of its terms. Only next to the middle
# between two BF16 numbers does that decide which of them is written, so an element may differ where a value
# this close rounds so.
OF_TERMS, OF_LARGEST = 2.0**-16, 2.0**-20
DO_NOT_USE = (
    "The adapter was merged into the wrong place or with the wrong scale, or the file changed after it was "
    "written: do not use this merge; report it with this log."
)


@dataclass
class Agreement:
    """What was compared: tensors, those with equal bits, and elements that float32's order of summing
    decided.
    """

    tensors: int = 0
    equal: int = 0
    by_order: int = 0


def compare(
    name: str, weight: torch.Tensor, applied: torch.Tensor, merged: torch.Tensor, agreement: Agreement
) -> bool:
    """Whether `merged` has the bits of `applied`, rounded once. Raises StageError, with the tensor's name,
    where the two differ by more than an order of summing.

    weight and merged (out, in) in the checkpoint's dtype, applied (out, in) float32: the weight with its
    change.
    """
    reference = applied.to(merged.dtype)
    merged, weight = merged.to(applied.device), weight.to(applied.device).float()
    agreement.tensors += 1
    if torch.equal(reference, merged):
        agreement.equal += 1
        return True
    change = applied - weight
    slack = OF_TERMS * (weight.abs() + change.abs()) + OF_LARGEST * change.abs().max()
    within = ((applied - slack).to(merged.dtype) <= merged) & (merged <= (applied + slack).to(merged.dtype))
    if not within.all():
        off = (merged.float() - reference.float()).norm() / (reference.float() - weight).norm().clamp_min(
            1e-30
        )
        raise StageError(
            f"{name} is not the base with the adapter's change: {int((~within).sum())} of {within.numel()} "
            f"elements differ from PEFT's, by {off.item():.2f} of the change",
            "W + scale * B A as PEFT reads the adapter, rounded once",
            DO_NOT_USE,
        )
    agreement.by_order += int((reference != merged).sum())
    return False
