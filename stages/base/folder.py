"""`source: folder`: an existing checkpoint, taken as it is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from nemotron.checkpoint import Checkpoint, CheckpointError
from nemotron.names import tensors
from stages import job

NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def run(task: job.Job) -> None:
    """Checks the folder of the recipe and links (or copies) its files into the output."""
    paths = task.sources.get("folder", [])
    if len(paths) != 1 or not paths[0].is_dir():
        raise job.StageError(f"source folder is {[str(p) for p in paths] or 'missing'}", "one checkpoint folder", "Name it in the recipe: `sources: {folder: PATH}`")
    check(paths[0])
    place(paths[0], task.output)


def check(folder: Path) -> None:
    """Raises StageError unless `folder` is a whole NemotronH checkpoint in BF16 and hub layout."""
    for name in NEEDED:
        if not (folder / name).exists():
            raise job.StageError(f"{folder.name} has no {name}", "a checkpoint folder with " + ", ".join(NEEDED), "Download the whole repository")
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "nemotron_h":
        raise job.StageError(f"model_type {config.get('model_type')!r}", "'nemotron_h'", "This line trains NemotronH models only")
    if config.get("quantization_config") or (folder / "hf_quant_config.json").exists():
        raise job.StageError(
            "a checkpoint that is already quantised", "the BF16 checkpoint it was made from",
            "LoRA needs gradients through exact weights, and a merge into 4-bit weights rounds the adapter away: take the BF16 repository",
        )
    try:
        entries = Checkpoint(folder).entries
        wanted = tensors(config)
    except (CheckpointError, ValueError) as error:
        raise job.StageError(str(error), "whole safetensors files that fit config.json", "Download the checkpoint again") from error
    entries = {name: entry for name, entry in entries.items() if not name.startswith("mtp.")}
    if missing := sorted(wanted.keys() - entries.keys()):
        raise job.StageError(f"{len(missing)} tensors are missing, first {missing[0]}", f"{len(wanted)} tensors in hub layout", "Download the checkpoint again")
    if extra := sorted(entries.keys() - wanted.keys()):
        raise job.StageError(f"{len(extra)} tensors that config.json does not call for, first {extra[0]}", f"{len(wanted)} tensors", "Files of another model lie in this folder")
    for name, spec in wanted.items():
        if entries[name].shape != spec.shape:
            raise job.StageError(f"{name} is {entries[name].shape}", f"{spec.shape}", "config.json and the weights belong to different models")
        if entries[name].dtype not in ("BF16", "F32"):
            raise job.StageError(f"{name} is {entries[name].dtype}", "BF16 (F32 for A_log, D and correction biases)", "Take the BF16 checkpoint")


def place(source: Path, output: Path) -> None:
    """Every file of `source` in `output`, hard-linked where both lie on one file system."""
    files = [file for file in sorted(source.rglob("*")) if file.is_file() and not any(part.startswith(".") for part in file.relative_to(source).parts)]
    for number, file in enumerate(files, 1):
        target = output / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), target)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(file, target)
        job.progress(number, len(files), "files", file.name)
