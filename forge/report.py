"""Plans, states, findings and results as tables for a person."""

from __future__ import annotations

import contextlib
import copy
import datetime
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from forge.finding import Finding
from forge.key import Change
from forge.plan import Explanation, Plan, age
from forge.store import Artifact
from forge.verify import Verdict

if TYPE_CHECKING:
    from forge.history import PastRun
    from forge.space import Item

_STATES = {"cached": "green", "run": "bold cyan", "waits": "cyan", "blocked": "red"}
# A path that is cut or broken cannot be copied; the terminal itself breaks the line.
WHOLE: dict[str, Any] = {"no_wrap": True, "overflow": "ignore"}
_LEVELS = {"error": "bold red", "warning": "yellow", "note": "dim"}


def clock(seconds: float) -> str:
    """`0:09`, `12:30`, `14:12:00`."""
    seconds = max(0, round(seconds))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


def time_of_day(seconds: float) -> str:
    """When `seconds` since 1970 is on this machine's clock: `14:05`, `Sun 14:05` on another day of the next
    six, `24 Dec 14:05`.
    """
    now, then = datetime.datetime.now().astimezone(), datetime.datetime.fromtimestamp(seconds).astimezone()
    days = (then.date() - now.date()).days
    return f"{then:%H:%M}" if not days else f"{then:%a %H:%M}" if 0 < days < 7 else f"{then:%-d %b %H:%M}"


def size(count: float) -> str:
    """Bytes in decimal units: `1.7 GB`."""
    for unit in ("B", "kB", "MB"):
        shown = f"{count:.{0 if unit == 'B' else 1}f}"
        if float(shown) < 1000:
            return f"{shown} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def figure(value: float) -> str:
    """`1.402`, `18,333`, `nan`."""
    if 1000 <= abs(value) < 1e12 or value in range(-1000, 1000):
        return f"{value:,.0f}"
    return f"{value:.4g}"


_SIZES = {"bytes": 1.0, "GB": 1e9}  # units of what stages count that are shown as sizes


def amount(done: float, total: float | None, unit: str) -> str:
    """What is counted, of how much if that is known: `82/200 steps`, `1.2 GB of 63.0 GB`."""
    if factor := _SIZES.get(unit):
        return size(done * factor) + (f" of {size(total * factor)}" if total else "")
    return f"{figure(done)}{f'/{figure(total)}' if total else ''} {unit}".rstrip()


def counted(count: int, word: str) -> str:
    """`1 file`, `3 files`."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def cut(head: str, said: str) -> Text:
    """`said` after a dim `head`, in one line that is cut where the terminal ends."""
    return Text.assemble((head, "dim"), " ".join(said.split()), no_wrap=True, overflow="ellipsis")


def near(path: Path | None) -> str:
    """A path as seen from here, if it lies below."""
    path = path or Path()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def plain_table(*columns: str) -> Table:
    """A table without lines; a column whose name begins with > is right-aligned and never wrapped."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=right)
    return table


@dataclass(frozen=True)
class Fitted:
    """A table that leaves out columns of `expendable`, the first one first, while the terminal is too narrow
    for it. Its first two columns, names and states, are never broken.
    """

    table: Table
    expendable: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table = copy.copy(self.table)
        for column in table.columns[:2]:
            column.no_wrap = True
        for name in self.expendable:
            if _least_width(table) > options.max_width:
                table.columns = [column for column in table.columns if column.header != name]
        yield table


_LEAST = 12  # columns of a text that is broken into lines


def _least_width(table: Table) -> int:
    """The columns of a terminal in which a table is still read well."""
    gap = 2
    widths = []
    for column in table.columns:
        widest = max(cell_len(str(cell)) for cell in (column.header, *column.cells))
        widths.append(widest if column.no_wrap else min(widest, _LEAST))
    return sum(widths) + gap * (len(widths) - 1)


def of_plan(plan: Plan) -> RenderableType:
    table = plain_table("stage", "state", ">time", ">memory", ">disk", "why")
    for stage in plan.stages:
        idle = stage.state in ("cached", "blocked")
        about = "" if stage.estimate.measured else "~"
        table.add_row(
            stage.name,
            Text(stage.state, style=_STATES[stage.state]),
            "" if idle else about + clock(stage.estimate.seconds),
            "" if idle else f"{stage.estimate.memory_gb:g} GB",
            "" if idle else about + size(stage.estimate.disk_gb * 1e9),
            Text(stage.why, style="dim" if idle else ""),
        )
    said = Text.assemble(f"\n{plan.recipe} · {plan.executor}: ", _said(plan))
    return Group(Fitted(table, ("disk", "memory")), said, *_legend(plan))


def _said(plan: Plan) -> tuple[str, str]:
    """What a plan comes to in words, and their style."""
    if blocked := [stage.name for stage in plan.stages if stage.state == "blocked"]:
        return f"cannot run: {', '.join(blocked)}", "red"
    if plan.pending:
        return f"{len(plan.pending)} of {len(plan.stages)} to run. {needs(plan)}", "bold"
    if plan.left_out:
        return f"nothing to run; built: {', '.join(stage.name for stage in plan.stages)}", "green"
    return "everything is built", "green"


def needs(plan: Plan) -> str:
    """What all that runs takes, in words."""
    return (
        f"The run takes about {clock(plan.seconds)}, {size(plan.disk_gb * 1e9)} of disk, and at most"
        f" {plan.memory_gb:g} GB of memory at a time."
    )


def _legend(plan: Plan) -> list[Text]:
    guessed = any(not stage.estimate.measured for stage in plan.pending)
    return [Text("~ estimated; without ~ as the last time on this machine", style="dim")] if guessed else []


def of_status(plan: Plan, newest: dict[str, Artifact | None], last: PastRun | None) -> RenderableType:
    """Every stage and its newest artifact, and how the last run ended unless well."""
    table = plain_table("stage", "state", "built", ">took", ">size", "key")
    for stage in plan.stages:
        artifact = stage.artifact or newest[stage.name]
        old = artifact is not None and stage.artifact is None
        cells = (
            ["never", "", "", ""]
            if artifact is None
            else [
                age(artifact.created) + (" (older)" if old else ""),
                clock(artifact.manifest["seconds"]),
                size(artifact.bytes),
                artifact.key[:12],
            ]
        )
        table.add_row(stage.name, Text(stage.state, style=_STATES[stage.state]), *cells)
    fitted = Fitted(table, ("key", "size", "took"))
    return Group(fitted, Text(), _ending(last)) if last and last.ending not in _WELL else fitted


_WELL = ("done", "under way")


def _ending(last: PastRun) -> RenderableType:
    """How a run ended that made not all that it was to make."""
    if last.ending.startswith("failed"):
        return Text(f"the last run {last.ending}: {last.found}", style="red")
    why = " (it was killed, or the machine went down)" if last.ending.startswith("cut off") else ""
    parts = [Text(f"the last run was {last.ending}{why}", style="yellow")]
    if last.resume:
        parts.append(Text(f"to go on: {last.resume}", style="yellow", **WHOLE))
    return Group(*parts)


def of_verdicts(verdicts: list[Verdict]) -> RenderableType:
    """A line for each stage whose artifact was read: its files, and whether they are what they were."""
    table = plain_table("stage", ">files", ">size", ">time", "verdict")
    styles = {"whole": "green", "damaged": "bold red", "not built": "dim"}
    for verdict in verdicts:
        read = verdict.state != "not built"
        table.add_row(
            verdict.stage,
            str(verdict.files) if read else "",
            size(verdict.bytes) if read else "",
            clock(verdict.seconds) if read else "",
            Text(verdict.state, style=styles[verdict.state]),
        )
    return table


def of_items(items: list[Item], words: str) -> RenderableType:
    """A line for each thing that takes space, the largest first, and their sum in `words`."""
    table = plain_table("what", "name", ">size", "made", "used by")
    for item in sorted(items, key=lambda item: -item.bytes):
        users = Text(", ".join(item.users) or "nothing", style="" if item.users else "dim")
        table.add_row(item.kind, item.name, size(item.bytes), age(item.created), users)
    total = f"{len(items)} {words}, {size(sum(item.bytes for item in items))}"
    fitted = Fitted(table, ("made",))
    return Group(fitted, Text(f"\n{total}", style="bold")) if items else Text(total, style="bold")


@contextlib.contextmanager
def reading(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr for `total` bytes; gives what is to be told of bytes as they are read."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


def finding_line(finding: dict[str, Any]) -> Text:
    style = _LEVELS[finding.get("level", "error")]
    said = (
        finding["found"]
        if finding.get("level") == "note"
        else f"found {finding['found']}; expected {finding['expected']}"
    )
    text = Text.assemble((finding["subject"], style), f": {said}", **WHOLE)
    return text.append(f"\n  {finding['remedy']}", style="dim") if finding["remedy"] else text


def of_findings(findings: list[Finding]) -> RenderableType:
    return Group(*(finding_line(f.__dict__) for f in findings))


def failure(event: dict[str, Any]) -> RenderableType:
    """A failed stage: what was found, what was expected, what to do; the last lines of its log and where
    it lies.
    """
    parts: list[RenderableType] = [Text()]
    if event["tail"]:
        parts += [Text(f"  {line}", style="dim") for line in event["tail"]] + [Text()]
    parts.append(Text(f"{event['subject'] or event['stage']} failed", style="bold red"))
    for word in ("found", "expected", "remedy"):
        if event[word]:
            parts.append(Text.assemble((f"  {word:<9}", "dim"), event[word]))
    if event["log"]:
        parts.append(Text.assemble(("  log      ", "dim"), near(Path(event["log"])), **WHOLE))
    return Group(*parts)


def of_result(plan: Plan, ran: tuple[str, ...], folder: Path | None) -> RenderableType:
    """How a run that succeeded left things: one line, or two."""
    last = next((s for s in reversed(plan.stages) if s.artifact), None)
    count = len(plan.stages)
    built = f"{counted(count, 'stage')} {'is' if count == 1 else 'are'} built"
    done = f"ran {', '.join(ran)}" if ran else f"nothing to do: {built}"
    text = Text.assemble((f"{plan.recipe} · {plan.executor}: ", "bold"), (done, "green"), **WHOLE)
    if ran and last and last.artifact:
        text.append(f"\n{last.name}: {near(last.artifact.folder)}\nlogs: {near(folder)}", style="dim")
    return Group(text)  # a bare Text is joined to a new one by print, which then wraps it


def of_explanation(explanation: Explanation) -> RenderableType:
    """A stage, its state, what it is compared with, and each changed component in one line, a source in one
    for each file.
    """
    stage = explanation.stage
    head = Text.assemble((stage.name, "bold"), ": ", (stage.state, _STATES[stage.state]), f", {stage.why}")
    if stage.state == "cached" or explanation.old is None:
        return Group(head, Text(f"  key {(stage.key.sha256 or 'open')[:12]}", style="dim"))
    against = f"compared with run {explanation.run}: " if explanation.run else ""
    keys = f"  {against}key {explanation.old[:12]} -> {(stage.key.sha256 or 'open')[:12]}"
    return Group(head, Text(keys, style="dim"), *_changes(explanation.changes))


def _changes(changes: Iterable[Change]) -> Iterator[Text]:
    for change in changes:
        if change.details:
            yield Text(f"  {change.subject}")
            yield from (Text(f"    {detail}") for detail in change.details)
        else:
            yield Text(f"  {change.phrase}")


def of_doctor(findings: list[Finding], plan: Plan) -> RenderableType:
    """What the whole run needs, and what of it this machine lacks."""
    subject = f"{plan.recipe} · {plan.executor}"
    whole = needs(plan) if plan.pending else "Everything is built."
    if not findings:
        return Text.assemble(f"{subject}: ", ("this machine has what it takes. ", "green"), whole)
    return Group(Text.assemble((f"{subject}: ", "bold"), whole), of_findings(findings))
