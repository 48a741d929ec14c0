"""Reading what artifacts hold, and comparing it with their manifests."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from forge import hashing, plan
from forge.finding import Finding, error
from forge.plan import Context
from forge.store import Artifact, Store

_THREADS = min(8, os.cpu_count() or 1)  # hashing is the processor's work; the disk serves several at once

OnBytes = Callable[[int], None]


def read(store: Store, artifact: Artifact, names: Iterable[str], on_bytes: OnBytes) -> list[str]:
    """Reads these files of an artifact from the disk. What is wrong with the artifact now, by name; nothing
    if it is whole. The memo learns what was read, so that a plan knows it too.

    `on_bytes` is told of every block read, from several threads. PermissionError if a file may not be read.
    """
    names = list(names)
    hashing.settle(artifact.folder / name for name in names)
    unreadable = []

    def content(name: str) -> tuple[str, os.stat_result | None] | str:
        try:
            sha256, stat = hashing.of_content(artifact.folder / name, on_bytes, from_disk=True)
        except PermissionError:
            raise
        except OSError as fault:  # a bad block of the disk
            return f"{name} cannot be read: {fault.strerror}"
        return (sha256, stat) if stat else f"{name} was written to while it was read"

    pool = ThreadPoolExecutor(_THREADS)
    try:
        for result in pool.map(content, names):
            if isinstance(result, str):
                unreadable.append(result)
            else:
                store.memo.remember(result[1], result[0])
    finally:
        pool.shutdown(cancel_futures=True)
    return unreadable + list(store.damages(artifact))


def summed(say: Callable[[int], None], seconds: float = 0.5) -> OnBytes:
    """Adds up the bytes that several threads read, and says the sum once in so many seconds."""
    lock, done, said = threading.Lock(), 0, time.monotonic()

    def on_bytes(count: int) -> None:
        nonlocal done, said
        with lock:
            done += count
            if time.monotonic() - said >= seconds:
                said = time.monotonic()
                say(done)

    return on_bytes


@dataclass(frozen=True)
class Verdict:
    """What was found of one stage's artifact: `state` is whole, damaged, or not built (under the present
    recipe and code).
    """

    stage: str
    state: str
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0
    damages: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "damages": list(self.damages), "seconds": round(self.seconds, 2)}


def size(context: Context, stages: Iterable[str]) -> int:
    """Bytes that `verify` reads."""
    lying = plan.recorded(context)
    return sum(lying[name].bytes for name in stages if name in lying)


def verify(context: Context, stages: Iterable[str], on_bytes: OnBytes) -> list[Verdict]:
    """Reads every byte of the stages' artifacts under the present recipe and code."""
    lying = plan.recorded(context)
    return [_verdict(context.store, name, lying.get(name), on_bytes) for name in stages]


def _verdict(store: Store, stage: str, artifact: Artifact | None, on_bytes: OnBytes) -> Verdict:
    if artifact is None:
        return Verdict(stage, "not built")
    began = time.monotonic()
    damages = tuple(read(store, artifact, store.readable(artifact), on_bytes))
    seconds = time.monotonic() - began
    files, state = len(artifact.manifest["files"]), "damaged" if damages else "whole"
    return Verdict(stage, state, files, artifact.bytes, seconds, damages)


def findings(context: Context, verdicts: Iterable[Verdict]) -> list[Finding]:
    """An error for each damaged artifact."""
    return [finding(context, verdict.stage, verdict.damages) for verdict in verdicts if verdict.damages]


def finding(context: Context, stage: str, damages: Iterable[str]) -> Finding:
    """What is wrong with a stage's artifact, and how to have it again."""
    command = f"python build.py run --recipe {context.recipe.option} --executor {context.executor}"
    return error(
        stage,
        "; ".join(damages),
        "the artifact as it was accepted",
        f"To make it again: {command} --until {stage}. Or put the file back from a copy.",
    )
