"""A check of a stage's sources and parameters that runs before any stage does, on the host, without the
stage's image.

A contract names such a module (`check = "stages.<name>.sources"`). It needs the standard library alone,
reads what it is given from stdin and writes a finding a line (docs/formats.md, A check).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stages.job import StageError, T, typed

MOST = 20  # findings of one check that are shown


@dataclass(frozen=True)
class Finding:
    """What is wrong: `subject` is a file and line, or a parameter; `level` is `error`, which stops a run,
    or `warning`.

    A `note` says what was decided and why: `found` is the sentence, and nothing is expected.
    """

    subject: str
    found: str
    expected: str = ""
    remedy: str = ""
    level: str = "error"


@dataclass(frozen=True)
class PlannedStage:
    """A stage as the recipe has it, before anything is built: no artifact, only parameters and the user's
    files.

    `inputs` holds the stages that supply its inputs, by input name; theirs are left out. `device` is `cpu`
    or `cuda`.
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
    sources = {name: [Path(path) for path in paths] for name, paths in raw["sources"].items()}
    return PlannedStage(
        raw["stage"],
        raw["params"],
        sources,
        {name: read_stage(below) for name, below in raw.get("inputs", {}).items()},
        raw["device"],
    )


def main(look: Callable[[PlannedStage], Iterable[Finding]]) -> None:
    """Runs `look` on the stage described on stdin and prints a JSON object for each finding. A StageError
    is a finding too.
    """
    stage = read_stage(json.load(sys.stdin))
    findings: list[Finding] = []
    try:
        findings += look(stage)
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
        print(json.dumps(asdict(finding)))
