"""Regular expressions of a user. On some texts a search would never end, so it has a limit of time."""

from __future__ import annotations

import re
import signal
from types import FrameType

SECONDS = 1.0  # for one search; a sound expression needs a thousandth


class TooSlow(Exception):
    """A search that was given up after SECONDS; its text is the expression."""


def fault(pattern: str) -> str:
    """Why `pattern` is no regular expression; "" if it is one."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error) or "nested too deeply"
    return ""


def found(pattern: str, text: str) -> bool:
    """Whether the expression is found anywhere in `text`. Raises TooSlow after SECONDS.

    Only the main thread can be interrupted, and Python's matcher looks for signals while it backtracks.
    """

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TooSlow(pattern)

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return re.search(pattern, text) is not None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
