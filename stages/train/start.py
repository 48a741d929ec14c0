"""What has to be set before torch is loaded, by everything that runs the steps of stage train. Imports the
standard library alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from model.layers import determinism, kernel_cache


def before_torch(warn: Callable[[str, str], None], deterministic: bool = False) -> None:
    """`warn(message, remedy)` is told where compiled kernels cannot be kept."""
    # Graphs of a dozen sizes share one pool of memory; in segments of fixed sizes each leaves pieces that
    # the next cannot use, a gigabyte a graph on an H100.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if deterministic:
        determinism.before_torch()
    kernel_cache.prepare(warn)
