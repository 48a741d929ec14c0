"""A run's progress as lines of a terminal, of any width.

Names of stages, their marks and the time left are always whole. What gives way to them is first the
explanation of what a stage does, then its metrics, then its bar.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.text import Text

from forge.progress import Metric, Progress, Row
from forge.report import amount, clock, figure, size, time_of_day

_MARKS = {
    "todo": ("·", "dim"),
    "running": ("▸", "bold cyan"),
    "cached": ("=", "dim green"),
    "done": ("✓", "green"),
    "failed": ("✗", "bold red"),
}
_GAP = "  "
_MOST_METRICS = 6
_BAR = range(8, 31)  # columns of a bar


@dataclass(frozen=True)
class _Line:
    text: Text
    rank: int = 0  # the larger, the earlier it gives way to the lines that do not fit


_FINISHED, _METRICS, _EXPLANATION = 1, 2, 3


def lines(progress: Progress, now: float, width: int, height: int) -> list[Text]:
    """The title, a line or more for each row, and when the run ends, in `width` columns. Explanations are
    left out, then metrics, then stages that are done, while there are more than `height` lines.
    """
    rows = list(progress.rows.values())
    names = max((len(row.name) for row in rows), default=0)
    names = names if names + len("= " + _GAP) <= width // 2 else 0  # too narrow for a column of names
    body = [line for row in _folded(rows) for line in _of_row(row, now, width, names)]
    foot = [_Line(Text(text, style="dim")) for text in _wrapped(_foot(progress, now), ", ", width)]
    every = [_Line(Text(progress.title, style="bold")), *body, *foot]
    for rank in (_EXPLANATION, _METRICS, _FINISHED):
        if len(every) > height:
            every = [line for line in every if line.rank != rank]
    return [line.text for line in every]


@dataclass(frozen=True)
class Now:
    """A run under way as its own screen shows it, for another terminal. `holder` is its process."""

    progress: Progress
    holder: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(f"\na run is under way: {self.holder}", style="cyan")
        yield from lines(self.progress, time.time(), options.max_width, sys.maxsize)
        if self.progress.unattended:
            closed = datetime.datetime.fromisoformat(self.progress.unattended).timestamp()
            yield Text(f"The terminal that started it closed at {time_of_day(closed)}; the run goes on.")


def _folded(rows: list[Row]) -> list[Row]:
    """The rows, in which all images that are ready share one."""
    ready = [row for row in rows if row.image and row.state == "done"]
    if len(ready) < 2:
        return rows
    note = clock(sum(row.seconds for row in ready))
    return [Row(f"{len(ready)} images", 0.0, state="done", note=note), *(r for r in rows if r not in ready)]


def _of_row(row: Row, now: float, width: int, names: int) -> list[_Line]:
    mark, style = _MARKS[row.state]
    head = Text.assemble((f"{mark} {row.name.ljust(names)}", style))
    if row.state != "running":
        note = Text(f"about {clock(row.estimate)}" if row.state == "todo" else row.note, style="dim")
        beside = _whole if row.state in ("todo", "done") else _beside
        rank = _FINISHED if row.state in ("done", "cached") else 0
        return [_Line(line, rank) for line in beside(head, note, width)]
    indent = " " * (len(head) + len(_GAP) if names and width >= 60 else 2)
    inner = width - len(indent)
    left = row.left(now)
    times = clock(row.elapsed(now)) + (f", {clock(left)} left" if left >= 1 else "")
    heads = _whole(head, Text(times), width)
    room = width - len(heads[-1]) - len(_GAP)
    count = count_of(row)
    if count and room >= len(count) + (len(_GAP) + _BAR[0]) * bool(row.total):
        heads[-1] = Text.assemble(heads[-1], _GAP, _bar(row, count, room))
    elif count:
        heads.append(Text.assemble(indent, _bar(row, count, inner)))
    metrics = _wrapped(metrics_of(row), _GAP, inner)
    about = [row.note or row.why] if row.note or row.why else []
    return [
        *map(_Line, heads),
        *(_Line(Text(indent + text), _METRICS) for text in metrics),
        *(_Line(_cropped(Text(indent + text, style="dim"), width), _EXPLANATION) for text in about),
    ]


def count_of(row: Row) -> str:
    """`82/200 steps`, `1.2/63.0 GB`; empty if nothing is counted."""
    return amount(row.done, row.total, row.unit) if row.done or row.total else ""


def metrics_of(row: Row) -> list[str]:
    """The row's last metrics, each such as `loss 1.402` or `memory 1.2 GB`."""
    return [_metric(name, metric) for name, metric in list(row.metrics.items())[-_MOST_METRICS:]]


def _metric(name: str, metric: Metric) -> str:
    if metric.unit == "bytes":
        return f"{name} {size(metric.value)}"
    return f"{name} {figure(metric.value)} {metric.unit}".rstrip()


def _bar(row: Row, count: str, room: int) -> Text:
    """The count, after a bar of what is done if there is room for one."""
    columns = min(room - len(count) - len(_GAP), _BAR[-1])
    if not row.total or columns < _BAR[0]:
        return _cropped(Text(count), room)
    full = int(columns * min(1.0, max(0.0, row.done / row.total)))
    return Text.assemble(("━" * full, "cyan"), ("─" * (columns - full), "dim"), _GAP, count)


def _foot(progress: Progress, now: float) -> list[str]:
    left = progress.left(now)
    gone = f"{clock(progress.gone(now))} gone"
    return [gone, *end_of(left)]


def end_of(left: float) -> list[str]:
    """How long a run still takes, and when it ends; nothing if that is not known."""
    return [f"about {clock(left)} left", f"ends {time_of_day(time.time() + left)}"] if left >= 1 else []


def _whole(head: Text, tail: Text, width: int) -> list[Text]:
    """Both in one line, or else in two; a name that is wider than a line goes on in the next."""
    joined = Text.assemble(head, _GAP, tail)
    if joined.cell_len <= width:
        return [joined]
    return [*_folded_name(head, width), Text.assemble("  ", tail)]


def _folded_name(head: Text, width: int) -> list[Text]:
    return [head[at : at + width] for at in range(0, len(head), width)]


def _beside(head: Text, note: Text, width: int) -> list[Text]:
    """A name, and as much of a note as fits beside it."""
    *folded, last = _folded_name(head, width)
    room = width - last.cell_len - len(_GAP)
    return [*folded, Text.assemble(last, _GAP, _cropped(note, room)) if room >= _BAR[0] else last]


def _cropped(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    return text


def _wrapped(pieces: Iterable[str], separator: str, width: int) -> list[str]:
    """The pieces in lines, broken between them."""
    lines: list[str] = []
    for piece in pieces:
        joined = f"{lines[-1]}{separator}{piece}" if lines else piece
        if lines and len(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(piece[:width])
    return lines
