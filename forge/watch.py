"""A run as it goes on: a live screen, sober lines where there is no terminal, or JSON lines for a program."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import IO, Protocol, cast

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from forge import screen
from forge.journal import Event
from forge.progress import Progress
from forge.report import clock, failure, finding_line
from forge.terminal import Output, outlived

_EVERY = 5.0  # seconds between two lines about the same stage


class Watcher(Protocol):
    def __call__(self, event: Event) -> None: ...
    def __enter__(self) -> Watcher: ...
    def __exit__(self, *of: object) -> None: ...


class JsonLines:
    """Every event as one JSON object a line; log lines are left to the log."""

    def __init__(self, output: Output):
        self.output = output

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *of: object) -> None:
        return None

    def __call__(self, event: Event) -> None:
        if event["event"] != "log":
            self.output.write(json.dumps(event) + "\n")
            self.output.flush()


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
            parts = [screen.count_of(row), row.note[:70], *screen.metrics_of(row)]
            parts.append(", ".join(screen.end_of(self.progress.left(now))))
            self.say(f"{row.name}: " + "  ".join(part for part in parts if part))

    def say(self, text: str) -> None:
        self.last = time.monotonic()
        self.console.print(
            f"[{clock(self.progress.gone(self.last))}] {text}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


class Screen:
    """The lines of forge/screen.py, drawn again and again; log lines stay off the screen."""

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
        width, height = self.console.size
        return Group(*screen.lines(self.progress, time.monotonic(), width, height))


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


@contextlib.contextmanager
def watcher(as_json: bool) -> Iterator[Watcher]:
    """The watcher for where stdout goes. What it watches outlives a terminal that closes."""
    with outlived(), _watcher(as_json, Output()) as watcher:
        yield watcher


def _watcher(as_json: bool, output: Output) -> Watcher:
    if as_json:
        return JsonLines(output)
    console = Console(file=cast(IO[str], output))
    drawn = output.isatty() and console.is_interactive and console.encoding.startswith("utf")
    return Screen(console) if drawn else Lines(console)
