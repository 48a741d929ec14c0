"""The table of executors. What an executor must do stands in forge/executor/__init__.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """`place`: module and class, which takes the repository and the home folder. Only the module of the
    executor that is asked for is imported.

    `images`: whether stages run in images of their own. If so, what only an image's build reads is part of
    every key.
    """

    place: str
    images: bool


# `make lint` holds every class to the protocol (tests/lint.py).
EXECUTORS = {
    "docker": Entry("forge.executor.docker:Docker", images=True),
    "local": Entry("forge.executor.local:Local", images=False),
}
