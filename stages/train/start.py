"""Settings that must be made before torch is loaded, for everything that runs the steps of stage train.
Imports only the standard library.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from model.layers import determinism, kernel_cache


def before_torch(warn: Callable[[str, str], None], deterministic: bool = False) -> None:
    """Sets the environment variables. Calls `warn(message, remedy)` if compiled kernels cannot be kept."""
    # CUDA graphs of a dozen sizes share one memory pool. With segments of fixed size each graph leaves pieces
    # that the next cannot use: a gigabyte per graph on an H100.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if deterministic:
        determinism.before_torch()
    kernel_cache.prepare(warn)
