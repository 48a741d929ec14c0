"""Limits of time and memory around a stranger's chat template.

transformers renders templates in jinja2's sandbox: they reach no file and no attribute of Python. But they
may loop or allocate without end.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from model.weights.paths import CheckpointError

SECONDS = 10.0  # for one conversation, which takes milliseconds
BYTES = 2**30  # that one rendering may add to the process
CHARACTERS = 100_000_000  # of one conversation as text
_REMEDY = "Take chat_template.jinja from the model's own repository."
_EXPECTED = "a chat template that renders one conversation in moments"


class _Late(BaseException):
    """Time is up. No `except Exception` of a library holds it."""


@contextmanager
def rendering() -> Iterator[None]:
    """Limits what happens inside to SECONDS and BYTES. Raises CheckpointError beyond, and for a template that
    calls itself without end. Raises RuntimeError outside of the main thread, where no timer can be set.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a chat template is rendered in the main thread alone: others have no timer")

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1.0)  # again, in case a library swallows the first
    try:
        with memory(BYTES):
            yield
    except _Late:
        raise CheckpointError(f"the chat template ran for {SECONDS:g} seconds", _EXPECTED, _REMEDY) from None
    except (MemoryError, RecursionError) as error:
        raise CheckpointError(
            f"the chat template ended in {type(error).__name__}", _EXPECTED, _REMEDY
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory(count: int) -> Iterator[None]:
    """Lets this process grow by `count` bytes at most. Beyond, what happens inside gets a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = min([used + count, *(value for value in (soft, hard) if value != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check_length(text: str) -> str:
    """`text`, or CheckpointError if it is too long for a conversation."""
    if len(text) > CHARACTERS:
        raise CheckpointError(
            f"the chat template made {len(text)} characters of one conversation", _EXPECTED, _REMEDY
        )
    return text
