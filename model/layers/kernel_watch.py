"""Counts and reports what Triton compiles, loads and tunes in this process.

A start on a GPU may spend a minute on this, and the stage would otherwise print nothing meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Counts:
    """Numbers of kernels compiled, of kernels loaded from the cache on disk, and of searches for a
    configuration.
    """

    compiled: int = 0
    loaded: int = 0
    tuned: int = 0


counts = Counts()
_tell: Callable[[str], None] | None = None


def start(tell: Callable[[str], None]) -> None:
    """Starts counting kernels, and calls `tell(note)` before each search and after each compilation. Raises
    ImportError without Triton.
    """
    global _tell
    import triton

    _tell = tell
    triton.knobs.compilation.listener = _compiled


def searching(kernel: str, configurations: int) -> None:
    """Called when a search begins (model/layers/tuning.py)."""
    counts.tuned += 1
    say(f"tuning {kernel}: {configurations} configurations are compiled and timed")


def say(note: str) -> None:
    """Passes a note to `tell` of `start`, if it was called."""
    if _tell:
        _tell(note)


def _compiled(*, src: Any = None, cache_hit: bool = False, **_: Any) -> None:
    if cache_hit:
        counts.loaded += 1
        return
    counts.compiled += 1
    say(f"compiled {getattr(src, 'name', 'a kernel')}")
