"""Two runs side by side, for a person."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from forge.difference import StageDifference
from forge.history import PastRun
from forge.key import Change
from forge.plan import age
from forge.report import WHOLE, counted, cut, plain_table
from product.difference import AnswerDifference, Answers, Figure, RunDifference
from product.rows import ChangedRow, PlacedRow, RowDifferences

MOST = 5  # entries of one kind that are shown without --all
NAMES = 3  # files of code or of an image in one line
BEFORE = 24  # characters before the place where two texts begin to differ

_STATES = {
    "same": ("same", "dim"),
    "other": ("changed", "cyan"),
    "gone": ("removed since", "yellow"),
    "only then": ("then only", "yellow"),
    "only now": ("now only", "yellow"),
}
_CHANGES = {"passed -> failed": "red", "failed -> passed": "green"}


def of_difference(difference: RunDifference, every: bool) -> RenderableType:
    """Stages, data, figures and answers; of long lists the first entries, unless `every` one is asked for."""
    most = None if every else MOST
    parts = [
        _head(difference.then, difference.now),
        _stages(difference.stages, None if every else NAMES),
        *(_data(difference.data, most) if difference.data else ()),
        *(_figures(difference.figures) if difference.figures else ()),
        *(_answers(difference.answers, most) if difference.answers else ()),
        *(Text(f"\nnot compared: {missing}", style="yellow") for missing in difference.missing),
    ]
    return Group(*parts)


def going_back(option: str) -> RenderableType:
    """How an earlier state comes back; `option` is what --recipe takes."""
    said = (
        "To go back, put recipe and data back: what is still there is not made again.\nOr take it as it is:"
        f" python build.py serve --recipe {option} --run RUN (or path STAGE)"
    )
    return Text("\n" + said, style="dim")


def _head(then: PastRun, now: PastRun) -> Text:
    runs = (("then", then), ("now ", now))
    lines = (f"{word}  {run.stamp}, {age(run.began)}, {run.ending}" for word, run in runs)
    return Text("\n".join(lines) + "\n", style="bold")


def _stages(stages: Iterable[StageDifference], most: int | None) -> RenderableType:
    table = plain_table("stage", "artifact", "made from")
    table.columns[1].no_wrap = True
    for stage in stages:
        word, style = _STATES[stage.state]
        lines = list(_changes(stage.changes, most))
        if stage.state == "other" and not lines:
            lines = ["other inputs"]
        table.add_row(stage.stage, Text(word, style=style), Text("\n".join(lines)))
    return table


def _changes(changes: Sequence[Change], most: int | None) -> Iterator[str]:
    """A line for each parameter and each file of the user; one for all of the code, one for the image."""
    for change in changes:
        if change.kind == "param":
            yield f"{change.name}: {_value(change.old)} -> {_value(change.new)}"
        elif change.kind == "source":
            yield from change.details or (f"{change.name}: other content",)
        elif change.kind not in ("code", "image", "product"):
            yield change.phrase
    for kind, word in (("code", "code"), ("image", "environment"), ("product", "serving image")):
        if names := [change.name for change in changes if change.kind == kind]:
            more = f" and {len(names) - most} more" if most and len(names) > most else ""
            yield f"{word}: {', '.join(names[:most])}{more}"


def _value(value: str | None) -> str:
    return "none" if value is None else value


def _data(data: RowDifferences, most: int | None) -> Iterator[RenderableType]:
    counts = [f"{len(rows)} {word}" for word, rows in _kinds(data).items() if rows]
    moved = [f"{data.moved} moved between training and held out"] if data.moved else []
    more = [f"{data.uncompared} more in one of the two"] if data.uncompared else []
    yield Text(f"\ndata: {counted(data.same, 'row')} the same{_joined(counts + moved + more)}", style="bold")
    for word, rows in _kinds(data).items():
        alike = _alike(rows)
        for row, *others in alike[:most]:
            yield from _row(word, row, len(others))
        yield from _left(alike, most)


def _kinds(data: RowDifferences) -> dict[str, tuple[ChangedRow | PlacedRow, ...]]:
    return {"changed": data.changed, "added": data.added, "removed": data.removed}


def _alike(rows: Iterable[ChangedRow | PlacedRow]) -> list[list[ChangedRow | PlacedRow]]:
    """Rows with the same change together: another system prompt changes all of them."""
    groups: dict[Any, list[ChangedRow | PlacedRow]] = {}
    for row in rows:
        change = (row.what, row.then, row.now) if isinstance(row, ChangedRow) else id(row)
        groups.setdefault(change, []).append(row)
    return list(groups.values())


def _row(word: str, row: ChangedRow | PlacedRow, others: int) -> Iterator[Text]:
    place = f"{row.file}:{row.line}"
    if isinstance(row, PlacedRow):
        yield cut(f"  {word:<8}", f"{place}  {row.text}")
        return
    was = f" (was line {row.line_then})" if row.line_then != row.line else ""
    more = f", and {counted(others, 'row')} more alike" if others else ""
    yield cut(f"  {word:<8}", f"{place}{was}  {row.what}{more}")
    yield from _then_and_now(row.then, row.now)


def _figures(figures: Iterable[Figure]) -> Iterator[RenderableType]:
    table = plain_table("figure", ">then", ">now")
    for figure in figures:
        table.add_row(
            figure.name,
            _figure(figure.then, figure.questions_then),
            _figure(figure.now, figure.questions_now),
        )
    yield Text()
    yield table


def _figure(value: float | None, questions: int | None) -> str:
    if value is None:
        return "·"
    return f"{value:.3f}" if questions is None else f"{value:.0f} of {questions}"


def _answers(answers: Answers, most: int | None) -> Iterator[RenderableType]:
    counts = [f"{count} {word}" for word, count in (("new", answers.new), ("gone", answers.gone)) if count]
    said = f"{len(answers.differ)} of {counted(answers.questions, 'question')} answered otherwise"
    yield Text(f"\nanswers: {said}{_joined(counts)}", style="bold")
    for answer in answers.differ[:most]:
        yield from _answer(answer)
    yield from _left(answers.differ, most)


def _answer(answer: AnswerDifference) -> Iterator[Text]:
    yield Text.assemble(
        f"  {answer.id}  ",
        (answer.change, _CHANGES.get(answer.change, "dim")),
        f", {', '.join(answer.columns)}",
        **WHOLE,
    )
    yield cut("    asked   ", answer.question)
    yield from _then_and_now(answer.then, answer.now)
    if faults := answer.faults_now or answer.faults_then:
        yield cut("    fault   " if answer.faults_now else "    mended  ", "; ".join(faults))


def _then_and_now(then: str, now: str) -> Iterator[Text]:
    """Two texts, each in one line, from shortly before they begin to differ."""
    one, other = (" ".join(said.split()) for said in (then, now))
    alike = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    start = one.rfind(" ", 0, max(0, alike - BEFORE)) + 1
    for word, said in (("then", one), ("now", other)):
        yield cut(f"    {word:<8}", ("..." if start else "") + said[start:] or "nothing")


def _left(entries: Sequence[object], most: int | None) -> Iterator[Text]:
    if most is not None and len(entries) > most:
        yield Text(f"  and {len(entries) - most} more: --all", style="dim")


def _joined(counts: list[str]) -> str:
    return "".join(f", {count}" for count in counts)
