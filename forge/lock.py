"""One writer at a time. The kernel holds the lock (flock), so a killed run frees it by itself."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from forge import modes
from forge.finding import Refused, error


def holder(path: Path) -> dict[str, Any] | None:
    """Who holds the lock: `pid`, `host`, `command`, `since`; None if it is free. Needs to read it only."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _read(path)
    finally:
        os.close(descriptor)


_FIELDS: dict[str, type | tuple[type, ...]] = {"pid": int, "host": str, "command": str, "since": (int, float)}


def _read(path: Path) -> dict[str, Any]:
    """What the holder has signed with; who that is stays open where it has not signed yet."""
    try:
        signed = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        signed = None
    if isinstance(signed, dict) and all(isinstance(signed.get(n), kind) for n, kind in _FIELDS.items()):
        return signed
    return {"pid": 0, "host": "?", "command": "a run that has just started", "since": time.time()}


def describe(owner: dict[str, Any]) -> str:
    minutes = int(min(max(0.0, time.time() - owner["since"]), 1e9) / 60)
    return f"process {owner['pid']} on {owner['host']}, for {minutes} min: {owner['command']}"


@contextlib.contextmanager
def held(path: Path, wait: bool, on_wait: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Holds the lock. If another run has it: calls `on_wait` once with its holder and waits, or is
    refused.
    """
    modes.make_folder(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, modes.file_mode())
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read(path)
            if not wait:
                raise Refused(
                    error(
                        "store",
                        f"a lock that is held by {describe(owner)}",
                        "no other run",
                        "Wait for it, or run without --no-wait.",
                    )
                ) from None
            on_wait(owner)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, 0)
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": shlex.join(sys.argv),
            "since": time.time(),
        }
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        yield
    finally:
        os.close(descriptor)
