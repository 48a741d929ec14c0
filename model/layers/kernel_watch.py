"""What Triton compiles, loads and tunes in this process: counted, and told as it happens.

A start on a GPU may spend a minute in it, during which a stage would otherwise say nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Counts:
    """Kernels compiled, kernels that were compiled before and came from the cache on disk, and searches
    for a configuration.
    """

    compiled: int = 0
    loaded: int = 0
    tuned: int = 0


counts = Counts()
_tell: Callable[[str], None] | None = None


def start(tell: Callable[[str], None]) -> None:
    """From now on kernels are counted, and `tell(note)` is called before each search and after each
    compilation. Raises ImportError without Triton.
    """
    global _tell
    import triton

    _tell = tell
    triton.knobs.compilation.listener = _compiled


def searching(kernel: str, configurations: int) -> None:
    """A search begins: model/layers/tuning.py."""
    counts.tuned += 1
    say(f"tuning {kernel}: {configurations} configurations are compiled and timed")


def say(note: str) -> None:
    """Tells a note, where somebody listens."""
    if _tell:
        _tell(note)


def _compiled(*, src: Any = None, cache_hit: bool = False, **_: Any) -> None:
    if cache_hit:
        counts.loaded += 1
        return
    counts.compiled += 1
    say(f"compiled {getattr(src, 'name', 'a kernel')}")
