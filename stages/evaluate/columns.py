"""The answers of one server's columns, kept in the scratch folder until all servers were asked: a stage that
was stopped does not load the models again that have answered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stages import job


@dataclass
class Columns:
    """By column: the answers in the order of the questions, the seconds that they took, and how many were
    different when streamed.
    """

    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    streamed_otherwise: dict[str, int] = field(default_factory=dict)

    def add(self, other: Columns) -> None:
        self.answers |= other.answers
        self.seconds |= other.seconds
        self.streamed_otherwise |= other.streamed_otherwise

    def save(self, scratch: Path) -> None:
        """Keeps them. The file has its name once it is whole and on the disk."""
        path = _file(scratch, self.answers)
        begun = path.with_suffix(".begun")
        with begun.open("w") as opened:
            json.dump(asdict(self), opened)
            opened.flush()
            os.fsync(opened.fileno())
        begun.replace(path)


def load(scratch: Path, columns: Iterable[str], questions: int) -> Columns | None:
    """What an earlier attempt kept of these columns; None if it kept nothing, or (with a warning) something
    else than an answer to each of the `questions`.
    """
    path = _file(scratch, columns)
    if not path.exists():
        return None
    try:
        kept = Columns(**json.loads(path.read_text()))
        if {len(answers) for answers in kept.answers.values()} == {questions}:
            return kept
    except (ValueError, TypeError, AttributeError):
        pass
    job.warning(
        f"{path.name}, the answers of an earlier attempt, is damaged",
        "The questions are asked again. If nobody changed the file, the disk may be failing: see dmesg.",
    )
    return None


def _file(scratch: Path, columns: Iterable[str]) -> Path:
    return scratch / f"answers-{'-'.join(columns)}.json"
