"""A check of a stage's sources and parameters. It runs on the host, before any stage does and without the
stage's image.

A contract names such a module (`check = "stages.<name>.sources"`). The module uses the standard library
alone. It reads the stage from stdin and prints one finding per line (docs/formats.md, A check).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stages.job import StageError, T, printable, typed

MOST = 20  # findings of one check that are shown


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `subject` is a file and line, or a parameter. `level` is `error`, which stops
    a run, or `warning`.

    The level `note` tells what was decided and why: `found` is the whole sentence, the other texts are empty.
    """

    subject: str
    found: str
    expected: str = ""
    remedy: str = ""
    level: str = "error"


@dataclass(frozen=True)
class PlannedStage:
    """A stage as the recipe describes it, before anything is built: it has parameters and the user's files,
    but no artifacts.

    `inputs` holds the stages that supply the inputs, by input name; the inputs of those stages are left out.
    `device` is `cpu` or `cuda`.
    """

    stage: str
    params: dict[str, Any]
    sources: dict[str, list[Path]] = field(default_factory=dict)
    inputs: dict[str, PlannedStage] = field(default_factory=dict)
    device: str = "cpu"

    def parameters(self, kind: type[T]) -> T:
        """`params` as the stage's dataclass (stages/<name>/parameters.py). Raises StageError unless they
        are exactly its fields.
        """
        return typed(kind, self.params)


def read_stage(raw: dict[str, Any]) -> PlannedStage:
    """The stage that forge describes as JSON."""
    sources = {name: [Path(path) for path in paths] for name, paths in raw["sources"].items()}
    return PlannedStage(
        raw["stage"],
        raw["params"],
        sources,
        {name: read_stage(below) for name, below in raw.get("inputs", {}).items()},
        raw["device"],
    )


def main(check_sources: Callable[[PlannedStage], Iterable[Finding]]) -> None:
    """Runs `check_sources` on the stage described on stdin and prints each finding as a JSON object. A
    StageError becomes a finding too.
    """
    stage = read_stage(json.load(sys.stdin))
    findings: list[Finding] = []
    try:
        findings += check_sources(stage)
    except StageError as error:
        findings.append(Finding(stage.stage, error.found, error.expected, error.remedy))
    if len(findings) > MOST:
        rest = len(findings) - MOST
        findings[MOST:] = [
            Finding(
                stage.stage,
                f"{rest} more findings of this kind",
                "none",
                "Mend those above first; the others are shown then.",
            )
        ]
    for finding in findings:
        print(json.dumps({name: printable(text) for name, text in asdict(finding).items()}))
