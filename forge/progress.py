"""What is known of a run from its events: a row for each stage, and each image that is made for it."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from forge.journal import Event
from forge.report import clock, counted, size

_IMAGE = "image "
_LONGEST = 1e8  # seconds that a run may still take by a pace that has just begun: three years


@dataclass(frozen=True)
class Metric:
    value: float
    unit: str = ""


@dataclass
class Row:
    """What is known of one stage (or one image) of the run. Times are in seconds."""

    name: str
    estimate: float
    measured: bool = False
    state: str = "todo"  # todo, running, cached, done, failed
    why: str = ""
    note: str = ""
    seconds: float = 0.0
    started: float = 0.0
    phase: float = 0.0  # when this count began: a stage may count to a new total
    phase_done: float = 0.0  # and where: a stage that goes on does not begin at 0
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    metrics: dict[str, Metric] = field(default_factory=dict)

    @property
    def image(self) -> bool:
        return self.name.startswith(_IMAGE)

    def elapsed(self, now: float) -> float:
        return max(0.0, now - self.started) if self.state == "running" else self.seconds

    def left(self, now: float) -> float:
        """Seconds this row still takes: an earlier run's time, or the pace of what is being counted."""
        if self.state == "todo":
            return self.estimate
        if self.state != "running":
            return 0.0
        by_estimate = max(0.0, self.estimate - self.elapsed(now))
        advanced = self.done - self.phase_done
        if self.total and advanced > 0 and now - self.phase > 2:
            by_pace = (now - self.phase) * max(0.0, self.total - self.done) / advanced
            return max(by_estimate, by_pace) if self.measured else by_pace
        return by_estimate

    def as_json(self, now: float) -> dict[str, Any]:
        return {
            "stage": self.name,
            "state": self.state,
            "seconds": round(self.elapsed(now), 1),
            "seconds_left": round(self.left(now), 1),
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "note": self.note,
            "metrics": {name: metric.value for name, metric in self.metrics.items()},
        }


class Progress:
    """The events so far, as rows. `now` is of one clock, in seconds."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.title = self.folder = self.unattended = ""
        self.started: float | None = None

    def take(self, event: Event, now: float) -> Row | None:
        """Takes one event in; gives the row that it is about."""
        kind = event["event"]
        self.started = now if self.started is None else self.started
        if kind == "plan":
            self._plan(event)
            return None
        if kind == "unattended":
            self.unattended = event["time"]
        name = event.get("stage") or (f"{_IMAGE}{event['image']}" if event.get("image") else "")
        if kind == "image" and name not in self.rows:
            self.rows = {name: Row(name, 0.0), **self.rows}
        row = self.rows.get(name)
        if row is None:
            return None
        if kind == "stage" or event.get("state") == "preparing":
            row.state, row.started, row.phase, row.why = "running", now, now, event.get("why", "")
        elif kind == "stage_done" or event.get("state") == "ready":
            row.state, row.seconds = "done", event["seconds"]
            made = f", {size(event['bytes'])}" if event.get("bytes") else ""
            row.note = clock(event["seconds"]) + made
        elif kind == "reading":
            row.state, row.started, row.phase = "running", now, now
            files = counted(event["files"], "file")
            row.why = f"reading {files} before use, {size(event['bytes'])}"
        elif kind == "read":
            row.state, row.seconds = event["state"], event["seconds"]
            whole = f"its files are what they were, {size(event['bytes'])} read in {clock(event['seconds'])}"
            row.note = "; ".join(event["damages"]) or whole
        elif kind == "cached":
            row.state, row.note = "cached", event["why"]
        elif kind == "progress":
            if event["done"] < row.done or event["unit"] != row.unit or event["total"] != row.total:
                row.phase, row.phase_done = now, event["done"]
            row.done, row.total, row.unit = event["done"], event["total"], event["unit"]
            row.note = event["note"]
        elif kind == "metric":
            row.metrics[event["name"]] = Metric(event["value"], event.get("unit", ""))
        elif kind == "log" and row.image:
            row.note = event["line"].strip()
        elif kind in ("failed", "interrupted"):
            row.state, row.seconds, row.note = "failed", row.elapsed(now), kind
        return row

    def _plan(self, event: Event) -> None:
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

    def gone(self, now: float) -> float:
        """Seconds since the run began."""
        return 0.0 if self.started is None else max(0.0, now - self.started)

    def left(self, now: float) -> float:
        return min(_LONGEST, sum(row.left(now) for row in self.rows.values()))

    def as_json(self, now: float) -> dict[str, Any]:
        """The rows, and the end of the run. `now` is seconds since 1970."""
        left = self.left(now)
        ends = datetime.datetime.fromtimestamp(now + left, datetime.UTC)
        return {
            "run": self.title,
            "folder": self.folder,
            "seconds": round(self.gone(now), 1),
            "seconds_left": round(left, 1),
            "ends": ends.isoformat(timespec="seconds"),
            "unattended": self.unattended or None,
            "stages": [row.as_json(now) for row in self.rows.values()],
        }


def of_events(events: Iterable[Event]) -> Progress:
    """A run's progress by the events that it wrote, whose clock is seconds since 1970."""
    progress = Progress()
    for event in events:
        progress.take(event, datetime.datetime.fromisoformat(event["time"]).timestamp())
    return progress
