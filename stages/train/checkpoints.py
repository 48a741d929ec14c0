"""Training checkpoints that record whether they are whole, because a run must not resume from one that was
cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

SEAL = "whole.json"


def seal(folder: Path) -> None:
    """Writes the digest of every file of a finished checkpoint into it, as the last file and atomically."""
    table = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SEAL:
            table[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    temporary = folder / f"{SEAL}.new"
    with temporary.open("w") as opened:
        json.dump(table, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.rename(folder / SEAL)


def is_whole(folder: Path) -> bool:
    """Whether the folder has its seal and every file has the digest of the seal."""
    try:
        table = json.loads((folder / SEAL).read_text())
        return all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
            for name, digest in table.items()
        )
    except (OSError, ValueError):
        return False


def step_number(folder: Path) -> int:
    """The step after which the checkpoint `folder` was saved."""
    return int(folder.name.rsplit("-", 1)[1])


def newest(scratch: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint in `scratch`, and the newer ones that are torn."""
    torn: list[Path] = []
    for folder in sorted(scratch.glob("checkpoint-[0-9]*"), key=step_number, reverse=True):
        if is_whole(folder):
            return folder, torn
        torn.append(folder)
    return None, torn


def clear(folder: Path) -> None:
    """Makes `folder` an empty folder, whatever a killed run left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def prune(scratch: Path, count: int) -> None:
    """Deletes all but the `kept` newest checkpoints."""
    for folder in sorted(scratch.glob("checkpoint-[0-9]*"), key=step_number)[:-count]:
        shutil.rmtree(folder)
