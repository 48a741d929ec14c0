"""Whether a merged tensor equals PEFT's result, rounded once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stages.job import StageError

# Summing the same float32 terms in another order changes the sum by about rank * 2**-24 of the terms. That
# changes the BF16 result only close to the middle between two BF16 numbers. So an element may differ if a
# value within this distance rounds to it.
OF_TERMS, OF_LARGEST = 2.0**-16, 2.0**-20
DO_NOT_USE = (
    "The adapter was merged into the wrong place or with the wrong scale, or the file changed after it was "
    "written: do not use this merge; report it with this log."
)


@dataclass
class Agreement:
    """Counts of tensors compared, of tensors with equal bits, and of elements that differ by float32's order
    of summing.
    """

    tensors: int = 0
    equal: int = 0
    by_order: int = 0


def compare(
    name: str, weight: torch.Tensor, applied: torch.Tensor, merged: torch.Tensor, agreement: Agreement
) -> bool:
    """Whether `merged` has the bits of `applied`, rounded once. Raises StageError with the tensor's name if
    they differ by more than the order of summing can explain.

    `weight` and `merged` (out, in) are in the checkpoint's dtype; `applied` (out, in), the weight with its
    change, is float32.
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
