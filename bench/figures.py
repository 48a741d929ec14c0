"""Figures of every measured way of training: time to the first step, median and 95th percentile, tokens per
second, padding, compilations, memory.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM = 3  # steps after which compilations count; they are not timed either, unless a run is as short as that


def started() -> float:
    """Start time of this process, on the clock of time.time()."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    booted = next(
        int(line.split()[1])
        for line in Path("/proc/stat").read_text().splitlines()
        if line.startswith("btime ")
    )
    return booted + ticks / os.sysconf("SC_CLK_TCK")


def counted(steps: int) -> slice:
    """The slice of a run's steps that is timed: those after WARM; in a shorter run those after the first; a
    single step itself.
    """
    return slice(WARM if steps > WARM else min(1, steps - 1), None)


def summary(times: list[float], tokens: list[int], computed: list[int]) -> dict[str, Any]:
    """Figures of a run. For each step: `times` in seconds, `tokens` of its conversations, `computed` tokens
    with padding.
    """
    steps = counted(len(times))
    timed = sorted(times[steps])
    return {
        "timed": len(timed),
        "ms": statistics.median(timed) * 1e3,
        "p95_ms": timed[int(len(timed) * 0.95)] * 1e3,
        "all_ms": [seconds * 1e3 for seconds in times],
        "tokens_per_s": sum(tokens[steps]) / sum(timed),
        "padded": 1 - sum(tokens[steps]) / sum(computed[steps]),
    }


class Compilations:
    """Counts what Triton compiles, or loads compiled, in this process after the first WARM steps of a run."""

    def __init__(self) -> None:
        import triton

        self.count, self.before, self.steps = 0, 0, 0
        triton.knobs.compilation.listener = self.listen

    def listen(self, **_: object) -> None:
        self.count += 1

    def step(self, number: int) -> None:
        """Call it after step `number` (from 0) of a run."""
        self.steps = number + 1
        if self.steps == WARM:
            self.before = self.count

    @property
    def after(self) -> int | None:
        """Compilations after WARM steps; None in a run without further steps."""
        return self.count - self.before if self.steps > WARM else None


COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("row", lambda r: r["row"]),
    ("lengths", lambda r: r["lengths"]),
    ("first s", lambda r: f"{r['first_s']:.1f}"),
    ("timed", lambda r: f"{r['timed']}"),
    ("median ms", lambda r: f"{r['ms']:,.0f}"),
    ("p95 ms", lambda r: f"{r['p95_ms']:,.0f}"),
    ("tokens/s", lambda r: f"{r['tokens_per_s']:,.0f}"),
    ("padded", lambda r: f"{r['padded']:.1%}"),
    ("compiled", lambda r: f"{r['compiled']}"),
    ("peak GB", lambda r: f"{r['peak_gb']:.2f}"),
    ("held GB", lambda r: f"{r['held_gb']:.1f}"),
    ("share", lambda r: f"{r['share']:.1%}"),
    ("loss", lambda r: f"{r['loss']:.3f}"),
    ("note", lambda r: r["note"]),
]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, aligned, without columns that no row has. A row that could not run shows its `why` instead of
    figures.
    """
    lines = [[_cell(show, row) for _, show in COLUMNS] for row in rows if "why" not in row]
    columns = [n for n in range(len(COLUMNS)) if n < 2 or any(line[n] not in ("-", "") for line in lines)]
    lines = [[COLUMNS[n][0] for n in columns], *([line[n] for n in columns] for line in lines)]
    wide = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    names = 2  # columns of words, aligned left
    for n, key in enumerate(("row", "lengths")):
        wide[n] = max(wide[n], *(len(row[key]) for row in rows))
    aligned = iter(
        [
            "  ".join(
                cell.ljust(wide[n]) if n < names or columns[n] == len(COLUMNS) - 1 else cell.rjust(wide[n])
                for n, cell in enumerate(line)
            )
            for line in lines
        ]
    )
    head = next(aligned)
    return "\n".join(
        [
            head,
            *(
                (
                    f"{row['row'].ljust(wide[0])}  {row['lengths'].ljust(wide[1])}  {row['why']}"
                    if "why" in row
                    else next(aligned).rstrip()
                )
                for row in rows
            ),
        ]
    )


def _cell(show: Callable[[dict[str, Any]], str], row: dict[str, Any]) -> str:
    """The cell of a row; "-" if the row lacks the figure: a CPU has no compilations, and the first step is
    measured once for several lengths.
    """
    try:
        return show(row)
    except KeyError:
        return "-"
