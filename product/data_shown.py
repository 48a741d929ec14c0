"""What `build.py data` found, for a person."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from forge.report import WHOLE, counted, near, plain_table
from product.chat import printable

REASONS = 10  # that are shown; rejects.jsonl has all
SAME = 200  # characters that two rows have in common at their start, from which they are shown once
TRAINED = "green"
MARKS = "[[", "]]"  # around trained text where there are no colours


@dataclass(frozen=True)
class TrainedText:
    """A row's text. What is trained is in colour, or between MARKS where the console has none. The first
    `known` characters have been shown before.
    """

    pieces: list[dict[str, Any]]
    known: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = console.no_color or console.color_system is None
        text, skipped = Text(), self.known
        if skipped:
            text.append(f"... {skipped:,} characters as above\n", style="dim")
        for piece in self.pieces:
            said = printable(piece["text"][skipped:])
            skipped = max(0, skipped - len(piece["text"]))
            if piece["trained"]:
                text.append(said.join(MARKS) if plain else said, style=TRAINED)
            else:
                text.append(said)
        yield text


def of_preview(seen: dict[str, Any]) -> RenderableType:
    """Counts, why rows are rejected, and the rows that were asked for."""
    parts: list[RenderableType] = [Text()]
    if seen["counts"]:
        parts.append(_counts(seen["counts"], seen["steps"]))
    if seen["reasons"]:
        parts += [Text(), *_reasons(seen["reasons"])]
    if seen["rejects"]:
        parts.append(Text(f"all of them: {near(Path(seen['rejects']))}", style="dim", **WHOLE))
    return Group(*parts, *_rows(seen["rows"]))


def _counts(counts: dict[str, Any], steps: dict[str, Any] | None) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    table.add_row("rows to train on", f"{counts['train']:,}", _epochs(steps) if steps else "")
    table.add_row("held out", f"{counts['eval']:,}", "" if counts["eval"] else "there is no held-out loss")
    table.add_row("rejected", f"{counts['rejected']:,}")
    table.add_row("duplicates", f"{counts['duplicates']:,}", "left out" if counts["duplicates"] else "")
    table.add_row(
        "longest row", f"{counts['longest']:,}", f"tokens; the median is {counts['median_length']:,}"
    )
    table.add_row("trained", f"{counts['trained_share']:.1%}", f"of {counts['tokens']:,} tokens")
    return table


def _epochs(steps: dict[str, Any]) -> str:
    return (
        f"an epoch is {counted(steps['epoch'], 'step')} of {steps['batch']};"
        f" {counted(steps['steps'], 'step')} are {steps['epochs']:g} epochs"
    )


def _reasons(reasons: list[dict[str, Any]]) -> Iterator[RenderableType]:
    table = plain_table(">rejected", "first", "why")
    for each in reasons[:REASONS]:
        why = Text(printable(each["reason"]))
        for name, value in each["raise"].items():
            why.append(f"\n{name}: {value} lets them in", style="dim")
        table.add_row(f"{each['count']:,}", printable(f"{each['file']}:{each['line']}"), why)
    yield table
    if len(reasons) > REASONS:
        yield Text(f"and {len(reasons) - REASONS} more reasons", style="dim")


def _rows(rows: list[dict[str, Any]]) -> Iterator[RenderableType]:
    """Each row under its place. What begins as the first one does, with the same system prompt and tools, is
    shown from where it differs.
    """
    before = ""
    for row in rows:
        place = printable(f"{row['file']}:{row['line']}")
        yield Text()
        if row["state"] == "absent":
            yield Text(f"{place}: no such row, or one that stands in an earlier line too", style="yellow")
        elif row["state"] == "rejected":
            yield Text.assemble((place, "bold"), f", rejected: {printable(row['reason'])}")
            yield Text(printable(row["head"]), style="dim")
        else:
            said = f", {row['state']}: {row['trained_tokens']:,} of {row['tokens']:,} tokens are trained"
            yield Text.assemble((place, "bold"), said)
            start = row["pieces"][0]["text"]
            yield TrainedText(row["pieces"], _known(before, start))
            before = before or start


def _known(before: str, start: str) -> int:
    """How many characters two texts have in common at their start, in whole lines and without the last of
    these, which says whose turn begins; 0 if they are few.
    """
    lines = zip(before.splitlines(keepends=True), start.splitlines(keepends=True), strict=False)
    common = [line for line, _ in takewhile(lambda pair: pair[0] == pair[1], lines)]
    same = sum(map(len, common[:-1]))
    return same if same >= SAME else 0
