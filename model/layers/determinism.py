"""Training that gives the same bits every time, on the same kind of GPU and in the same image.

Kernels that add in arbitrary order (atomics) are replaced by ordered ones. mamba-ssm and torch's flash
attention follow torch's own switch, which raises RuntimeError for any torch operation without an ordered
kernel. Sums also depend on a kernel's block sizes, so no configuration is chosen by timing
(model/layers/tuning.py).
"""

from __future__ import annotations

import os


def before_torch() -> None:
    """Sets what must be set before torch first calls cuBLAS: a separate workspace for every stream (NVIDIA's
    cuBLAS manual, "Results reproducibility").
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


def enable() -> None:
    """Switches deterministic algorithms on in this process."""
    import torch

    torch.use_deterministic_algorithms(True)
    # By default torch would also fill all new memory, in case it is read before it is written: one more pass
    # over each tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # made at runtime


def enabled() -> bool:
    """Whether `enable` was called."""
    import torch

    return torch.are_deterministic_algorithms_enabled()
