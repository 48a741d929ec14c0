"""A run as it goes on: a live screen, sober lines where there is no terminal, or JSON lines for a program."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from rich.console import Console, Group, JustifyMethod
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from forge.journal import Event
from forge.report import clock, failure, finding_line, size

_EVERY = 5.0  # seconds between two lines about the same stage


@dataclass
class Row:
    """What is known of one stage (or one image) of the run."""

    name: str
    estimate: float
    measured: bool = False
    state: str = "todo"  # todo, running, cached, done, failed
    why: str = ""
    note: str = ""
    seconds: float = 0.0
    started: float = 0.0
    phase: float = 0.0  # when `done` was last at its start: a stage may count to a new total
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    metrics: dict[str, float] = field(default_factory=dict)

    def elapsed(self, now: float) -> float:
        return now - self.started if self.state == "running" else self.seconds

    def left(self, now: float) -> float:
        """Seconds this row still takes: an earlier run's time, or the pace of what is being counted."""
        if self.state == "todo":
            return self.estimate
        if self.state != "running":
            return 0.0
        by_estimate = max(0.0, self.estimate - self.elapsed(now))
        if self.total and self.done > 0 and now - self.phase > 2:
            by_pace = (now - self.phase) * max(0.0, self.total - self.done) / self.done
            return max(by_estimate, by_pace) if self.measured else by_pace
        return by_estimate


class Progress:
    """The events so far, as rows. `now` is a monotonic clock in seconds."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.title = self.folder = ""
        self.started = time.monotonic()

    def take(self, event: Event, now: float) -> Row | None:
        """Takes one event in; gives the row that it is about."""
        kind = event["event"]
        if kind == "plan":
            self.title, self.folder = f"{event['recipe']} · {event['executor']}", event.get("folder", "")
            for stage in event["stages"]:
                cached = stage["state"] == "cached"
                self.rows[stage["stage"]] = Row(
                    stage["stage"],
                    0.0 if cached else stage["seconds"],
                    stage["measured"],
                    "cached" if cached else "todo",
                    note=stage["why"] if cached else "",
                )
            return None
        name = event.get("stage") or (f"image {event['image']}" if event.get("image") else "")
        if kind == "image" and name not in self.rows:
            self.rows = {name: Row(name, 0.0), **self.rows}
        row = self.rows.get(name)
        if row is None:
            return None
        if kind == "stage" or event.get("state") == "preparing":
            row.state, row.started, row.phase, row.why = "running", now, now, event.get("why", "")
        elif kind == "stage_done" or event.get("state") == "ready":
            row.state, row.seconds = "done", event["seconds"]
            row.note = (
                f"{clock(event['seconds'])}, {size(event['bytes'])}"
                if kind == "stage_done"
                else clock(event["seconds"])
            )
        elif kind == "reading":
            row.state, row.started, row.phase = "running", now, now
            row.why = f"reading {event['files']} files before they are used, {size(event['bytes'])}"
        elif kind == "read":
            row.state, row.seconds = event["state"], event["seconds"]
            whole = f"its files are what they were, {size(event['bytes'])} read in {clock(event['seconds'])}"
            row.note = "; ".join(event["damages"]) or whole
        elif kind == "cached":
            row.state, row.note = "cached", event["why"]
        elif kind == "progress":
            if event["done"] < row.done or event["unit"] != row.unit or event["total"] != row.total:
                row.phase = now
            row.done = event["done"]
            row.total = event["total"]
            row.unit = event["unit"]
            row.note = event.get("note", "")
        elif kind == "metric":
            row.metrics[event["name"]] = event["value"]
        elif kind == "log" and name.startswith("image "):
            row.note = event["line"].strip()
        elif kind in ("failed", "interrupted"):
            row.state, row.seconds, row.note = "failed", now - row.started, kind
        return row

    def left(self, now: float) -> float:
        return sum(row.left(now) for row in self.rows.values())


def _counted(row: Row) -> str:
    total = f"/{row.total:g}" if row.total else ""
    return f"{row.done:g}{total} {row.unit}".strip() if row.done or row.total else ""


def _metrics(row: Row) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in list(row.metrics.items())[-3:])


class Watcher(Protocol):
    def __call__(self, event: Event) -> None: ...
    def __enter__(self) -> Watcher: ...
    def __exit__(self, *of: object) -> None: ...


class JsonLines:
    """Every event as one JSON object a line on stdout; log lines are left to the log."""

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *of: object) -> None:
        return None

    def __call__(self, event: Event) -> None:
        if event["event"] != "log":
            print(json.dumps(event), flush=True)


class Lines:
    """A line when something begins or ends, and every few seconds in between."""

    def __init__(self, console: Console):
        self.console, self.progress, self.last = console, Progress(), 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *of: object) -> None:
        return None

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        row = self.progress.take(event, now)
        if announce(event, self.console) or row is None:
            return
        kind = event["event"]
        if kind in ("stage", "reading") or event.get("state") == "preparing":
            self.say(f"{row.name}: {row.why or 'preparing'}")
        elif kind in ("stage_done", "cached", "read") or event.get("state") == "ready":
            self.say(f"{row.name}: {row.state}, {row.note}")
        elif kind in ("progress", "log", "metric") and row.state == "running" and now - self.last >= _EVERY:
            parts = [
                _counted(row),
                row.note[:70],
                _metrics(row),
                f"about {clock(self.progress.left(now))} left",
            ]
            self.say(f"{row.name}: " + "  ".join(p for p in parts if p))

    def say(self, text: str) -> None:
        self.last = time.monotonic()
        self.console.print(
            f"[{clock(self.last - self.progress.started)}] {text}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


class Screen:
    """One row a stage, with a bar, what it counts, its metrics and the time left; log lines stay off the
    screen.
    """

    _MARKS: ClassVar = {
        "todo": ("·", "dim"),
        "running": ("▸", "bold cyan"),
        "cached": ("=", "dim green"),
        "done": ("✓", "green"),
        "failed": ("✗", "bold red"),
    }

    def __init__(self, console: Console):
        self.console, self.progress = console, Progress()
        self.live = Live(console=console, get_renderable=self.render, refresh_per_second=8, transient=False)

    def __enter__(self) -> Screen:
        self.live.start()
        return self

    def __exit__(self, *of: object) -> None:
        self.live.stop()

    def __call__(self, event: Event) -> None:
        self.progress.take(event, time.monotonic())
        announce(event, self.console)

    def render(self) -> Group:
        now = time.monotonic()
        table = Table.grid(padding=(0, 1))
        columns: tuple[JustifyMethod, ...] = ("left", "left", "left", "right", "left")
        for justify in columns:
            table.add_column(justify=justify, no_wrap=True, overflow="ellipsis")
        for row in self.progress.rows.values():
            mark, style = self._MARKS[row.state]
            cells: list[Any] = ["", "", Text(row.note, style="dim")]
            if row.state == "running":
                bar = ProgressBar(total=row.total or None, completed=row.done, width=26, pulse=not row.total)
                about = "  ".join(p for p in (_counted(row), _metrics(row), row.note or row.why) if p)
                left = row.left(now)
                times = clock(row.elapsed(now)) + (f", {clock(left)} left" if left >= 1 else "")
                cells = [bar, times, Text(about)]
            elif row.state == "todo":
                cells = ["", "", Text(f"about {clock(row.estimate)}", style="dim")]
            table.add_row(Text(mark, style=style), Text(row.name, style=style), *cells)
        gone, left = now - self.progress.started, self.progress.left(now)
        foot = f"{clock(gone)} gone" + (f", about {clock(left)} left" if left >= 1 else "")
        return Group(Text(self.progress.title, style="bold"), table, Text(foot, style="dim"))


def announce(event: Event, console: Console) -> bool:
    """Says what belongs to no row: warnings, waiting, how it ended. True if the event was one of these."""
    kind = event["event"]
    if kind == "waiting":
        console.print(Text(f"waiting for another run: {event['holder']}", style="yellow"))
    elif kind == "finding":
        console.print(finding_line(event), soft_wrap=True)
    elif kind == "warning":
        console.print(
            Text(
                f"{event.get('stage', '')}: {event['message']} {event.get('remedy', '')}".strip(),
                style="yellow",
            )
        )
    elif kind == "failed":
        console.print(failure(event), crop=False)
    elif kind == "interrupted":
        console.print(
            Text(
                f"stopped in {event['stage'] or 'preparation'}; nothing is lost. To go on: {event['resume']}",
                style="yellow",
            )
        )
    else:
        return kind in ("plan", "done", "error")
    return True


def watcher(as_json: bool) -> Watcher:
    """The watcher for where stdout goes."""
    if as_json:
        return JsonLines()
    console = Console()
    return Screen(console) if console.is_terminal and sys.stdout.isatty() else Lines(console)
