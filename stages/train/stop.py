"""SIGTERM and Ctrl-C end training after the step under way, so that a checkpoint of it can be saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from stages.job import StageError


@dataclass
class Stop:
    """Whether a signal has asked for the end of training."""

    asked: bool = False


@contextmanager
def listening() -> Iterator[Stop]:
    """What has been asked for meanwhile. A second Ctrl-C ends the process at once. A second SIGTERM does not,
    because torchrun passes on to its ranks what they may have got already.
    """
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped(done: int, steps: int) -> StageError:
    """The end of a run that was asked to stop after step `done`."""
    return StageError(
        f"a signal to stop after step {done}, whose checkpoint is saved",
        f"training to go on to step {steps}",
        "Run again to go on from this step",
    )
