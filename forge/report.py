"""Plans, states, findings and results as tables for a person."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from forge.finding import Finding
from forge.key import Change
from forge.plan import Context, Explanation, Plan, age
from forge.store import Artifact
from forge.verify import Verdict

if TYPE_CHECKING:
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


def size(count: float) -> str:
    """Bytes in decimal units: `1.7 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


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


def of_plan(plan: Plan) -> RenderableType:
    table = plain_table("stage", "state", ">time", ">memory", ">disk", "why")
    for stage in plan.stages:
        idle = stage.state == "cached"
        about = "" if stage.estimate.measured else "~"
        table.add_row(
            stage.name,
            Text(stage.state, style=_STATES[stage.state]),
            "" if idle else about + clock(stage.estimate.seconds),
            "" if idle else f"{stage.estimate.memory_gb:g} GB",
            "" if idle else about + size(stage.estimate.disk_gb * 1e9),
            Text(stage.why, style="dim" if idle else ""),
        )
    blocked = [stage.name for stage in plan.stages if stage.state == "blocked"]
    if blocked and not plan.pending:
        return Group(
            table, Text(f"\n{plan.recipe} · {plan.executor}: cannot run: {', '.join(blocked)}", style="red")
        )
    if not plan.pending:
        return Group(table, Text(f"\n{plan.recipe} · {plan.executor}: everything is built", style="green"))
    total = (
        f"{len(plan.pending)} of {len(plan.stages)} to run: about {clock(plan.seconds)},"
        f" {size(plan.disk_gb * 1e9)} of disk, {plan.memory_gb:g} GB of memory"
    )
    return Group(table, Text(f"\n{plan.recipe} · {plan.executor}: {total}", style="bold"))


def of_status(
    plan: Plan, newest: dict[str, Artifact | None], holder: str, ending: dict[str, Any] | None
) -> RenderableType:
    """Every stage and its newest artifact; who is running (`holder`), or how the last run ended unless
    well.
    """
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
    if holder:
        return Group(table, Text(f"\na run is under way: {holder}", style="cyan"))
    if ending and ending["event"] == "failed":
        return Group(
            table,
            Text(
                f"\nthe last run failed in {ending['stage'] or 'preparation'}: {ending['found']}", style="red"
            ),
        )
    if ending and ending["event"] == "interrupted":
        return Group(
            table,
            Text(
                f"\nthe last run was stopped in {ending['stage'] or 'preparation'}; to go on:"
                f" {ending['resume']}",
                style="yellow",
            ),
        )
    return table


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
    return Group(table, Text(f"\n{total}", style="bold")) if items else Text(total, style="bold")


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
    done = f"ran {', '.join(ran)}" if ran else f"nothing to do: {len(plan.stages)} stages are built"
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


def of_doctor(findings: list[Finding], context: Context) -> RenderableType:
    subject = f"{context.recipe.name} · {context.executor}"
    if not findings:
        return Text(f"{subject}: this machine has what it takes", style="green")
    return Group(Text(subject, style="bold"), of_findings(findings))
