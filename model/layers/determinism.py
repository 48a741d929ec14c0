"""Training that ends in the same bits every time: on the same kind of GPU, in the same image.

Kernels that add in whatever order their blocks come (atomics) give way to ones that have an order:
mamba-ssm and torch's flash attention follow torch's own switch, which raises RuntimeError for any other
operation of torch that has none. Sums also depend on how a kernel is cut into blocks, so nothing is timed
to choose one (model/layers/tuning.py).
"""

from __future__ import annotations

import os


def before_torch() -> None:
    """What has to be set before torch first calls cuBLAS: a workspace of its own for every stream
    (NVIDIA's cuBLAS manual, "Results reproducibility").
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


def enable() -> None:
    """From now on in this process."""
    import torch

    torch.use_deterministic_algorithms(True)
    # torch would also write into all memory that it hands out, lest something is read before it was written:
    # a pass over each tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # made at runtime


def enabled() -> bool:
    """Whether `enable` was called."""
    import torch

    return torch.are_deterministic_algorithms_enabled()
