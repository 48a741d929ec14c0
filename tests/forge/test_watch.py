"""What a person sees of a run."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console

from forge import report, watch

PLAN = {
    "event": "plan",
    "recipe": "toy",
    "executor": "local",
    "stages": [
        {"stage": "data", "state": "cached", "why": "built 3 h ago", "seconds": 9.0, "measured": True},
        {"stage": "train", "state": "run", "why": "never built", "seconds": 100.0, "measured": False},
        {"stage": "merge", "state": "waits", "why": "after train", "seconds": 20.0, "measured": True},
    ],
}
STARTED = {"event": "stage", "stage": "train", "why": "never built", "key": "k"}


def progressed(done, total=40):
    return {"event": "progress", "stage": "train", "done": done, "total": total, "unit": "steps", "note": ""}


def test_time_left_comes_from_the_pace_and_from_what_is_still_to_come():
    progress = watch.Progress()
    progress.take(PLAN, 0)
    assert progress.left(0) == 120
    progress.take(STARTED, 10)
    progress.take(progressed(0), 10)
    progress.take(progressed(10), 20)
    assert progress.left(20) == 30 + 20  # 10 steps took 10 s, 30 are left; then merge
    progress.take(progressed(1, total=5), 30)  # a new count begins: its pace counts from here
    progress.take(progressed(3, total=5), 36)
    assert progress.left(36) == 4 + 20
    progress.take({"event": "stage_done", "stage": "train", "seconds": 26.0, "bytes": 2e9}, 36)
    assert progress.left(36) == 20 and progress.rows["train"].note == "0:26, 2.0 GB"


def shown(watcher_of, *events):
    console = Console(
        file=io.StringIO(), width=110, force_terminal=watcher_of is watch.Screen, color_system=None
    )
    with watcher_of(console) as watcher:
        for event in events:
            watcher(event)
        if watcher_of is watch.Screen:
            console.print(watcher.render())
    return console.file.getvalue()


METRIC = {"event": "metric", "stage": "train", "name": "loss", "value": 0.41234, "step": 12}


def test_the_screen_has_a_row_a_stage_with_count_and_metrics():
    text = shown(watch.Screen, PLAN, STARTED, progressed(12), METRIC)
    for word in (
        "toy · local",
        "= data",
        "built 3 h ago",
        "▸ train",
        "12/40 steps",
        "loss 0.4123",
        "· merge",
        "about 0:20",
        "left",
    ):
        assert word in text


def test_log_lines_stay_off_the_screen():
    assert "chatter" not in shown(
        watch.Screen, PLAN, STARTED, {"event": "log", "stage": "train", "line": "chatter"}
    )


def test_without_a_terminal_it_is_sober_lines():
    text = shown(
        watch.Lines,
        PLAN,
        STARTED,
        progressed(12),
        {"event": "stage_done", "stage": "train", "seconds": 4.0, "bytes": 100},
    )
    assert text.splitlines() == ["[0:00] train: never built", "[0:00] train: done, 0:04, 100 B"]


def test_a_warning_is_shown_with_its_remedy():
    text = shown(
        watch.Lines,
        PLAN,
        STARTED,
        {"event": "warning", "stage": "train", "message": "few rows", "remedy": "Add some."},
    )
    assert "train: few rows Add some." in text


def test_a_path_is_never_broken_by_a_narrow_terminal(tmp_path):
    long = str(tmp_path / "artifact" / ("0123456789" * 6))
    built = SimpleNamespace(name="package", artifact=SimpleNamespace(folder=Path(long)))
    console = Console(width=40, record=True, file=io.StringIO())
    watch.announce(
        {
            "event": "finding",
            "level": "warning",
            "subject": "secret",
            "found": long,
            "expected": "another",
            "remedy": "",
        },
        console,
    )
    console.print(
        report.of_result(
            SimpleNamespace(recipe="toy", executor="local", stages=[built]), ("package",), Path(long)
        ),
        crop=False,
    )
    assert console.export_text().count(long) == 3
