"""What a person sees of a run."""

from __future__ import annotations

import dataclasses
import datetime
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy
from rich.console import Console

from forge import history, report, screen, watch
from forge.progress import of_events

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
    assert progress.left(36) == 6 + 20  # 2 of 5 words in 6 s: 2 are left
    progress.take({"event": "stage_done", "stage": "train", "seconds": 26.0, "bytes": 2e9}, 36)
    assert progress.left(36) == 20 and progress.rows["train"].note == "0:26, 2.0 GB"


def shown(watcher_of, *events, width=110, height=24):
    console = Console(
        file=io.StringIO(),
        width=width,
        height=height,
        force_terminal=watcher_of is watch.Screen,
        color_system=None,
    )
    with watcher_of(console) as watcher:
        for event in events:
            watcher(event)
        if watcher_of is watch.Screen:
            console.print(watcher.render())
    return console.file.getvalue()


def test_the_pace_of_a_stage_that_goes_on_does_not_count_what_was_done_before():
    progress = watch.Progress()
    for event, now in ((PLAN, 0), (STARTED, 0), (progressed(91, total=200), 0), (progressed(100, 200), 18)):
        progress.take(event, now)
    assert progress.rows["train"].left(18) == 200


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


def metric(name, value, unit=""):
    return {"event": "metric", "stage": "train", "name": name, "value": value, "unit": unit}


BUSY = [
    PLAN,
    {**STARTED, "why": "the parameter learning_rate changed: 0.0002 -> 0.0001 (and 5 more)"},
    progressed(0, total=200),
    metric("loss", 1.58123),
    metric("speed", 18333.2, "tokens/s"),
    metric("memory", 6.12e10, "bytes"),
    metric("held-out loss", 1.40211),
    progressed(82, total=200),
]


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_names_marks_and_times_are_whole_at_every_width(width):
    lines = shown_lines(*BUSY, width=width)
    assert max(map(len, lines)) <= width
    assert [line[:7] for line in lines if line[:1] in "=▸·"] == ["= data ", "▸ train", "· merge"]
    text = " ".join(" ".join(lines).split())
    for word in ("1:23, 1:59 left", "82/200 steps", "loss 1.581", "about 0:20", "1:23 gone", "left", "ends "):
        assert word in text
    if width >= 40:
        for word in ("held-out loss 1.402", "speed 18,333 tokens/s", "memory 61.2 GB", "━", "built 3 h ago"):
            assert word in text
    assert ("(and 5 more)" in text) == (width >= 80)


def shown_lines(*events, width, height=24):
    """The lines of a run whose last event comes 83 s after all others."""
    progress = screen.Progress()
    for event in events:
        progress.take(event, 83.0 if event is events[-1] else 0.0)
    return [line.plain for line in screen.lines(progress, 83.0, width, height)]


def test_a_low_terminal_keeps_what_runs_and_the_time_left():
    tall = shown_lines(*BUSY, width=80)
    for height in range(5, len(tall)):
        low = shown_lines(*BUSY, width=80, height=height)
        assert len(low) <= height or len(low) == 4
        assert any(line.startswith("▸ train") for line in low) and low[-1].startswith("1:23 gone")
    assert not any("learning_rate" in line for line in shown_lines(*BUSY, width=80, height=len(tall) - 1))


def test_a_name_wider_than_the_terminal_goes_on_in_the_next_line():
    plan = {**PLAN, "stages": [{**PLAN["stages"][1], "stage": "a-stage-with-a-long-name"}]}
    progress = screen.Progress()
    progress.take(plan, 0)
    lines = [line.plain for line in screen.lines(progress, 0, 16, 24)]
    assert "".join(lines[1:3]) == "· a-stage-with-a-long-name" and lines[3] == "  about 1:40"


def test_images_that_are_ready_share_a_row():
    events = [PLAN]
    for name in ("train", "of data", "of merge"):
        events.append({"event": "image", "image": name, "state": "preparing"})
        events.append({"event": "image", "image": name, "state": "ready", "seconds": 20.0})
    lines = shown(watch.Screen, *events[:-1], width=80).splitlines()
    assert any(line.startswith("✓ 2 images") and "0:40" in line for line in lines)
    assert any(line.startswith("▸ image of merge") for line in lines)


def test_events_that_were_written_give_the_same_progress(tmp_path):
    started = {**STARTED, "time": "2026-11-28T12:00:00+00:00"}
    events = [{**PLAN, "time": "2026-11-28T11:59:00+00:00"}, started]
    events += [
        {**metric("loss", 1.5), "time": "2026-11-28T12:00:10+00:00"},
        {**progressed(0, total=200), "time": "2026-11-28T12:00:00+00:00"},
        {**progressed(50, total=200), "time": "2026-11-28T12:00:50+00:00"},
        {"event": "unattended", "time": "2026-11-28T12:00:51+00:00"},
    ]
    now = datetime.datetime(2026, 11, 28, 12, 1, tzinfo=datetime.UTC).timestamp()
    told = of_events(events).as_json(now)
    assert (told["seconds"], told["seconds_left"], told["ends"]) == (120, 200, "2026-11-28T12:04:20+00:00")
    assert told["unattended"] == "2026-11-28T12:00:51+00:00"
    train = told["stages"][1]
    assert (train["state"], train["done"], train["total"], train["metrics"]) == (
        "running",
        50,
        200,
        {"loss": 1.5},
    )


def test_sizes_figures_and_times_are_for_people():
    assert [report.size(n) for n in (4.1e-06 * 1e9, 999_949, 999_951, 999.7, 217.1e9)] == [
        "4.1 kB",
        "999.9 kB",
        "1.0 MB",
        "1.0 kB",
        "217.1 GB",
    ]
    assert report.amount(0.000376832, 0.00264623, "GB") == "376.8 kB of 2.6 MB"
    assert report.amount(3, None, "kernels") == "3 kernels"
    assert [report.figure(n) for n in (1.40211, 18333.2, 2.0, float("nan"), -1e13)] == [
        "1.402",
        "18,333",
        "2",
        "nan",
        "-1e+13",
    ]
    noon = datetime.datetime.now().astimezone().replace(hour=12, minute=5)
    days = [(noon + datetime.timedelta(days=n)) for n in (0, 2, 9)]
    assert [report.time_of_day(day.timestamp()) for day in days] == [
        "12:05",
        f"{days[1]:%a} 12:05",
        f"{days[2]:%-d %b} 12:05",
    ]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_tables_keep_names_and_states_whole(width, mini):
    mini.run(last="count")
    toy.edit(mini.recipe, "upper: false", "upper: true")
    plan = mini.plan()
    newest = {stage.name: mini.context().store.newest(stage.name, "toy", "local") for stage in plan.stages}
    last = next(history.of_recipe(mini.context().store, "toy"))
    cut = dataclasses.replace(last, ending="cut off in slow", resume="python build.py run --recipe toy")
    for table in (report.of_plan(plan), report.of_status(plan, newest, cut)):
        console = Console(file=io.StringIO(), width=width)
        console.print(table, crop=False)
        lines = console.file.getvalue().splitlines()
        assert [line.split()[:2] for line in lines[1:6] if line[:1] in "wcs" and line[:1].strip()] == [
            ["words", "run"],
            ["count", "waits"],
            ["slow", "waits"],
        ]
        assert ("disk" in lines[0] or "key" in lines[0]) == (width > 40)
    assert "to go on: python build.py run --recipe toy" in lines


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
