"""`source: folder`: an existing checkpoint, used unchanged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

from model import audit
from model.families import registry, tokens
from model.families.unknown import ConfigError
from model.weights import origin
from model.weights.checkpoint import Checkpoint
from model.weights.paths import TRUST, member, members, read_json
from stages import job
from stages.job import Job, StageError

NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def run(task: Job) -> None:
    """Checks the folder that the recipe names and links (or copies) its files into the output."""
    source = given(task)
    check(source)
    link_files(source, task.output)


def given(task: Job) -> Path:
    """The checkpoint folder that the recipe names. Raises StageError unless there is one."""
    paths = task.sources.get("folder", [])
    if len(paths) != 1 or not paths[0].is_dir():
        raise StageError(
            f"source folder is {[str(p) for p in paths] or 'missing'}",
            "one checkpoint folder",
            "Name it in the recipe: `sources: {folder: PATH}`",
        )
    return paths[0]


def check(folder: Path) -> None:
    """Raises StageError unless `folder` is a whole checkpoint of a known family in BF16 and hub layout, with
    finite values. Raises CheckpointError for a name, link or file that is not allowed.

    Stage merge runs the same audit again. Running it here too refuses a bad base before the training, not
    after it.
    """
    check_description(folder)
    if faults := audit.bf16(folder, values=False):
        refuse(faults)
    tokens.load(folder)
    check_finite(Checkpoint(folder))


def check_description(folder: Path) -> None:
    """The part of `check` that needs neither weights nor tokenizer. Raises as it does."""
    for name in NEEDED:
        if not member(folder, name).exists():
            raise StageError(
                f"{folder.name} has no {name}",
                "a checkpoint folder with " + ", ".join(NEEDED),
                "Download the whole repository",
            )
    if member(folder, TRUST).exists():
        raise StageError(
            f"{folder.name} has a {TRUST}",
            "none: a checkpoint cannot say of itself that its code is trusted",
            "Copy the checkpoint without this file, and use the copy (source: folder).",
        )
    origin.read(folder)
    config = read_json(folder / "config.json")
    try:
        registry.of(config)
    except ConfigError as error:
        raise StageError(error.found, error.expected, error.remedy) from error
    if config.get("quantization_config") or member(folder, audit.QUANT).exists():
        raise StageError(
            "a checkpoint that is already quantised",
            "the BF16 checkpoint it was made from",
            "LoRA needs gradients through exact weights, and a merge into 4-bit weights rounds the adapter"
            " away: take the BF16 repository",
        )


def check_finite(checkpoint: Checkpoint) -> None:
    """Reads every tensor, one at a time. Raises StageError with the name of the first that holds NaN or
    infinity.
    """
    done = 0
    for name, entry in checkpoint.entries.items():
        if faults := list(audit.not_finite(checkpoint, [name])):
            refuse(faults)
        done += entry.bytes
        job.progress(done / 1e9, checkpoint.bytes / 1e9, "GB", f"{name} is finite")


def refuse(faults: list[audit.Finding]) -> NoReturn:
    """Raises StageError with the first fault and the number of the others."""
    first, more = faults[0], f", and {len(faults) - 1} more" if faults[1:] else ""
    raise StageError(f"{first.subject}: {first.found}{more}", first.expected, first.remedy)


def link_files(source: Path, output: Path, patterns: Sequence[str] = ("*",)) -> None:
    """Puts every file of `source` that one of `patterns` names into `output`: a hard link, or a copy on
    another file system. A link becomes the file that it leads to. Raises CheckpointError before anything is
    written.
    """
    files = [
        file
        for file in members(source)
        if any(fnmatch(str(file.relative_to(source)), pattern) for pattern in patterns)
    ]
    for number, file in enumerate(files, 1):
        target = output / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), target)
        except OSError:  # another file system, or no hard links
            shutil.copyfile(file, target)
        job.progress(number, len(files), "files", file.name)
