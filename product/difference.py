"""Two runs side by side: what they were made from, their data, their figures and their answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from forge import difference
from forge.difference import StageDifference
from forge.finding import Refused, error
from forge.history import PastRun
from forge.store import Store
from product import DATA, EVALUATE, TRAIN, rows
from product.evaluated import faults, passed, said
from product.rows import RowDifferences

Value = TypeVar("Value")

# training.json's losses, in nats a token, as a person calls them
LOSSES = {
    "first": "training loss, first step",
    "last": "training loss, last steps",
    "held_out_base": "held-out loss, before training",
    "held_out": "held-out loss, kept step",
    "held_out_last": "held-out loss, last step",
}


@dataclass(frozen=True)
class Figure:
    """A figure of both runs, None where one has none; of passed questions also how many were asked."""

    name: str
    then: float | None
    now: float | None
    questions_then: int | None = None
    questions_now: int | None = None


@dataclass(frozen=True)
class AnswerDifference:
    """A question that `columns` answer otherwise. Answers and faults are those of the last of them: one that
    passed in one run alone, if there is one.
    """

    id: str
    columns: tuple[str, ...]
    question: str
    then: str
    now: str
    faults_then: tuple[str, ...]
    faults_now: tuple[str, ...]

    @property
    def change(self) -> str:
        states = ["failed" if faults else "passed" for faults in (self.faults_then, self.faults_now)]
        return " -> ".join(states) if states[0] != states[1] else f"{states[1]} both times"


@dataclass(frozen=True)
class Answers:
    """`questions` were asked in both runs; `new` and `gone` more in one of the two."""

    questions: int
    new: int
    gone: int
    differ: tuple[AnswerDifference, ...]


@dataclass(frozen=True)
class RunDifference:
    """`data` and `answers` are None where they are the same, or cannot be compared; `missing` says of what
    cannot be compared why.
    """

    then: PastRun
    now: PastRun
    stages: tuple[StageDifference, ...]
    figures: tuple[Figure, ...]
    data: RowDifferences | None
    answers: Answers | None
    missing: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        differ = [{**asdict(a), "change": a.change} for a in self.answers.differ] if self.answers else []
        return {
            "then": self.then.as_json(),
            "now": self.now.as_json(),
            "stages": [stage.as_json() for stage in self.stages],
            "figures": [asdict(figure) for figure in self.figures],
            "data": asdict(self.data) if self.data else None,
            "answers": {**asdict(self.answers), "differ": differ} if self.answers else None,
            "missing": self.missing,
        }


def of_runs(store: Store, then: PastRun, now: PastRun, order: list[str]) -> RunDifference:
    """What differs between two runs; `order` is that of the recipe's stages. Refused if a file of an artifact
    cannot be read, which `build.py verify` says more about.
    """
    stages = tuple(difference.of_runs(store, then, now, order))
    by_name = {stage.stage: stage for stage in stages}
    return RunDifference(
        then,
        now,
        stages,
        figures=(
            *(_compared(by_name.get(EVALUATE), _shares) or ()),
            *(_compared(by_name.get(TRAIN), _losses) or ()),
        ),
        data=_compared(by_name.get(DATA), rows.differences, if_same=False),
        answers=_compared(by_name.get(EVALUATE), _answers, if_same=False),
        missing=tuple(_missing(by_name, then, now)),
    )


def _compared(
    stage: StageDifference | None, compare: Callable[[Path, Path], Value], if_same: bool = True
) -> Value | None:
    """What `compare` says of the artifacts of a stage; None if one is not there, or both are the same."""
    if stage is None or stage.then is None or stage.now is None or (stage.state == "same" and not if_same):
        return None
    try:
        return compare(stage.then.folder, stage.now.folder)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as fault:
        raise Refused(
            error(
                stage.stage,
                f"files that cannot be read ({fault}), in {stage.then.folder} or {stage.now.folder}",
                "the files as the stage wrote them",
                "See what was changed: python build.py verify",
            )
        ) from fault


def _missing(stages: dict[str, StageDifference], then: PastRun, now: PastRun) -> Iterator[str]:
    what = {DATA: "rows", TRAIN: "losses", EVALUATE: "passed questions and answers"}
    for name, words in what.items():
        stage = stages.get(name)
        for run, artifact in ((then, stage and stage.then), (now, stage and stage.now)):
            if artifact is None and not (stage and stage.state == "same"):
                removed = name in run.keys
                why = "was removed since" if removed else "is not in that run"
                yield f"{words}: {name} of {run.stamp} {why}"


def _shares(then: Path, now: Path) -> list[Figure]:
    reports = [json.loads((folder / "report.json").read_text()) for folder in (then, now)]
    questions = [int(report["questions"]) for report in reports]
    before, after = map(passed, reports)
    return [
        Figure(f"passed, {column}", before.get(column), after.get(column), *questions)
        for column in {**before, **after}
    ]


def _losses(then: Path, now: Path) -> list[Figure]:
    losses = [json.loads((folder / "training.json").read_text())["loss"] for folder in (then, now)]
    return [
        Figure(name, losses[0].get(key), losses[1].get(key))
        for key, name in LOSSES.items()
        if losses[0].get(key) is not None or losses[1].get(key) is not None
    ]


def _answers(then: Path, now: Path) -> Answers:
    before, after = (_by_question(folder / "answers.jsonl") for folder in (then, now))
    both = [question for question in after if question in before]
    differ = [d for question in both if (d := _answer(question, before[question], after[question]))]
    return Answers(
        questions=len(both),
        new=len(after) - len(both),
        gone=len(before) - len(both),
        differ=tuple(sorted(differ, key=_rank)),
    )


def _rank(answer: AnswerDifference) -> tuple[bool, int]:
    """The most interesting ones first: what broke, then what was mended; what the base says is last."""
    ranks = ["passed -> failed", "failed -> passed", "failed both times", "passed both times"]
    return answer.columns == ("base",), ranks.index(answer.change)


def _by_question(file: Path) -> dict[str, dict[str, Any]]:
    """Id of a question -> column -> what answers.jsonl has."""
    questions: dict[str, dict[str, Any]] = {}
    with file.open("rb") as lines:
        for line in lines:
            answer = json.loads(line)
            questions.setdefault(answer["id"], {})[answer["column"]] = answer
    return questions


def _answer(question: str, then: dict[str, Any], now: dict[str, Any]) -> AnswerDifference | None:
    """None if each column that both have answers as it did."""
    compared = ("question", "answer", "tool_calls", "failures")
    differ = [c for c in now if c in then and any(then[c][key] != now[c][key] for key in compared)]
    if not differ:
        return None
    differ.sort(key=lambda column: bool(then[column]["failures"]) != bool(now[column]["failures"]))
    old, new = then[differ[-1]], now[differ[-1]]
    return AnswerDifference(
        id=question,
        columns=tuple(differ),
        question=new["question"] or "",
        then=said(old),
        now=said(new),
        faults_then=faults(old),
        faults_now=faults(new),
    )
