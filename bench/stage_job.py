"""Runs stages of this repository for a bench: as separate processes, with the defaults of their contracts."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]


def defaults(stage: str) -> dict[str, Any]:
    """The parameters of a stage and their defaults; None for one that a recipe must set."""
    contract = tomllib.loads((REPO / "stages" / stage / "stage.toml").read_text())["parameters"]
    return {name: parameter.get("default") for name, parameter in contract.items()}


def command(
    stage: str,
    file: Path,
    device: str,
    inputs: dict[str, Path],
    output: Path,
    scratch: Path,
    params: dict[str, Any],
) -> list[str]:
    """Writes the job to `file` and returns the command that runs it in REPO. Empties `output` and keeps
    `scratch`, from which a stage resumes.
    """
    shutil.rmtree(output, ignore_errors=True)
    for path in (output, scratch):
        path.mkdir(parents=True, exist_ok=True)
    job = {
        "stage": stage,
        "params": defaults(stage) | params,
        "seed": 0,
        "device": device,
        "inputs": {name: str(path) for name, path in inputs.items()},
        "output": str(output),
        "scratch": str(scratch),
    }
    file.write_text(json.dumps(job))
    return [sys.executable, "-m", f"stages.{stage}", str(file)]


def write_rows(folder: Path, conversations: Iterable[list[int]]) -> None:
    """Writes the files of stage data that stage train reads: train.jsonl with the second half of each
    conversation trained, and eval.jsonl with the first four conversations.
    """
    folder.mkdir(parents=True)
    rows = [
        {"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]} for ids in conversations
    ]
    for name, part in (("train", rows), ("eval", rows[:4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
