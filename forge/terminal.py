"""A terminal may close while a run goes on, as when an ssh session ends. The run outlives it.

Whoever finds that the terminal is gone raises SIGHUP, which the kernel also sends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType


class Output:
    """stdout, of which a terminal may close: what is written to it from then on goes nowhere."""

    def __init__(self) -> None:
        self._stream = sys.stdout
        self._terminal = sys.stdout.isatty()
        self.encoding = sys.stdout.encoding

    def isatty(self) -> bool:
        """As when this began: rich would write nothing more to a terminal that is closed, and none would see
        that it is.
        """
        return self._terminal

    def write(self, text: str) -> int:
        with self._closing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._closing():
            self._stream.flush()

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        except OSError as fault:
            if fault.errno != errno.EIO or not self._terminal:
                raise
            os.kill(os.getpid(), signal.SIGHUP)  # the main thread hears it, whichever this is


@contextlib.contextmanager
def told_of_closing(tell: Callable[[], None]) -> Iterator[None]:
    """Has `tell` called when the terminal closes, after what was to be called then."""
    before = signal.getsignal(signal.SIGHUP)

    def closed(number: int, frame: FrameType | None) -> None:
        if callable(before):
            before(number, frame)
        tell()

    signal.signal(signal.SIGHUP, closed)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
def outlived() -> Iterator[None]:
    """From when the terminal closes, what is written to it goes nowhere, and SIGHUP ends nothing."""
    terminals = [descriptor for descriptor in range(3) if os.isatty(descriptor)]

    def leave() -> None:
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for descriptor in terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    with told_of_closing(leave):
        yield
