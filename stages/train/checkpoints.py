"""Training checkpoints that are whole or not there: a kill or a power cut at any moment leaves the one before
or the new one. A run must never resume from one that was damaged later, so each records its digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SEAL = "whole.json"
UNFINISHED = "unfinished-checkpoint"
KEPT = 2  # checkpoints that stay in scratch


@contextmanager
def saving(scratch: Path, step: int) -> Iterator[Path]:
    """A folder for the files of the checkpoint after `step`. On leaving it they are on the disk and get their
    place, and only then the older checkpoints are deleted.
    """
    unfinished, target = scratch / UNFINISHED, scratch / f"checkpoint-{step}"
    _remove(unfinished)
    unfinished.mkdir(parents=True)
    yield unfinished
    (unfinished / SEAL).write_text(json.dumps(_digests(unfinished), indent=1))
    for path in unfinished.iterdir():
        sync(path)
    _remove(target)  # it was damaged, or the run would have gone on from it
    put(unfinished, target)
    _prune(scratch, step)


def newest(scratch: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint in `scratch`, and the newer ones that are damaged."""
    damaged: list[Path] = []
    for folder in reversed(_all(scratch)):
        if is_whole(folder):
            return folder, damaged
        damaged.append(folder)
    return None, damaged


def is_whole(folder: Path) -> bool:
    """Whether the folder holds exactly the files of its seal, with their digests."""
    try:
        return bool(json.loads((folder / SEAL).read_text()) == _digests(folder) != {})
    except (OSError, ValueError, RecursionError):
        return False


def step_number(folder: Path) -> int:
    """The step after which the checkpoint `folder` was saved."""
    return int(folder.name.rsplit("-", 1)[1])


def put(path: Path, target: Path) -> None:
    """Renames a file or folder so that a power cut leaves all of it at `target`, or what was there before."""
    sync(path)
    path.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Waits until the disk holds a file's content, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _all(scratch: Path) -> list[Path]:
    """Every checkpoint of `scratch`, by its step."""
    folders = [path for path in scratch.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=step_number)


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file by its name, without the seal."""
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != SEAL:
            with path.open("rb") as opened:
                digests[path.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def _prune(scratch: Path, step: int) -> None:
    """Deletes all but the KEPT newest checkpoints up to `step`. Later ones are damaged: the run began before
    them.
    """
    kept = [folder for folder in _all(scratch) if step_number(folder) <= step][-KEPT:]
    for folder in _all(scratch):
        if folder not in kept:
            _remove(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
