"""What a run made, in the words of who ordered it: questions passed by each model, which failed and how, the
held-out loss, and one sentence on what to do about it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forge.finding import Refused, error
from forge.plan import Context, Plan
from product import ADAPTER, REPORT
from product.compare import POINTS
from product.evaluated import faults, passed, said

Z = 1.96  # of the normal distribution: 95 % lie within


@dataclass(frozen=True)
class Share:
    """How many of the questions a model passed."""

    column: str
    passed: int
    questions: int

    @property
    def share(self) -> float:
        return self.passed / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """Where the share lies with 95 % confidence, had other questions of this kind been asked: Wilson's
        score interval.
        """
        n, p = self.questions, self.share
        middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Failed:
    """A question that the models `columns` failed; `answer` and `faults` are of the last of them."""

    id: str
    columns: tuple[str, ...]
    question: str
    answer: str
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """`training` is training.json of the adapter; empty where the stage that trains is not built."""

    shares: tuple[Share, ...]
    gate: dict[str, Any]
    failed: tuple[Failed, ...]
    folder: Path
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """What is the matter, where it was seen, and what to try; empty if nothing can be said."""
        shares = {share.column: share.share for share in self.shares}
        room = max(POINTS / 100, 1 / self.shares[0].questions) + 1e-9
        before, after = (shares.get(column) for column in ("merged", "nvfp4"))
        tuned = shares.get("tuned", before)
        if tuned is not None and before is not None and before < tuned - room:
            return (
                f"Lost in the merge: merged passes {before:.0%}, tuned {tuned:.0%}. Compare their answers:"
                " answers.jsonl of the report has both."
            )
        if tuned is not None and after is not None and after < tuned - room:
            return (
                f"Lost in four bits: NVFP4 passes {after:.0%}, BF16 {tuned:.0%}. Train attention alone"
                " (train.targets: attention), or through the rounding (train.qat_share: 0.4)."
            )
        return str(self.training.get("verdict", {}).get("says", ""))

    def as_json(self) -> dict[str, Any]:
        shares = [{**asdict(share), "interval": share.interval} for share in self.shares]
        failed = [asdict(question) for question in self.failed]
        return {
            "shares": shares,
            "gate": self.gate,
            "failed": failed,
            "verdict": self.verdict,
            "training": self.training,
            "folder": str(self.folder),
        }


def of_plan(context: Context, plan: Plan) -> Iterator[Outcome]:
    """The outcome of each built stage of `plan` that produces a report."""
    folders: dict[str, list[Path]] = {REPORT: [], ADAPTER: []}
    for stage in plan.stages:
        produced = context.recipe.stages[stage.name].contract.produces
        if stage.artifact and produced in folders:
            folders[produced].append(stage.artifact.folder)
    for folder in folders[REPORT]:
        yield of_folder(folder, next(iter(folders[ADAPTER]), None))


def of_folder(folder: Path, adapter: Path | None = None) -> Outcome:
    """The outcome in a `report` artifact and, with its `peft-adapter` artifact, of the training. Refused if
    a file cannot be read, which `build.py verify` says more about.
    """
    try:
        report = json.loads((folder / "report.json").read_text())
        shares = tuple(Share(column, count, report["questions"]) for column, count in passed(report).items())
        with (folder / "answers.jsonl").open() as lines:
            answers = [json.loads(line) for line in lines]
        training = json.loads((adapter / "training.json").read_text()) if adapter else {}
        return Outcome(shares, report["gate"], tuple(_failed(answers)), folder, training)
    except (ValueError, LookupError, TypeError, RecursionError) as fault:
        raise Refused(
            error(
                str(folder),
                f"a report that cannot be read ({fault})",
                "the files as stage evaluate wrote them",
                "See what was changed: python build.py verify",
            )
        ) from fault


def _failed(answers: list[dict[str, Any]]) -> Iterator[Failed]:
    """The questions that a tuned model failed; what the base fails is what training is there for."""
    questions: dict[str, list[dict[str, Any]]] = {}
    for answer in answers:
        if answer["column"] != "base" and answer["failures"]:
            questions.setdefault(answer["id"], []).append(answer)
    for name, faulty in questions.items():
        last = faulty[-1]
        yield Failed(
            name,
            tuple(answer["column"] for answer in faulty),
            last["question"] or "",
            said(last),
            faults(last),
        )
