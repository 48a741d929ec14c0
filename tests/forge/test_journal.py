"""Run folders sort by the order in which runs began, whatever the clock says."""

from __future__ import annotations

import datetime
import time

import pytest

from forge import journal
from forge.mask import Mask


def begun(home, recipe="toy"):
    run = journal.Journal(home, recipe, Mask(()), lambda event: None)
    run.close()
    return run.folder.name


@pytest.fixture
def clock(monkeypatch):
    def at(*time):
        monkeypatch.setattr(journal, "_now", lambda: datetime.datetime(*time, tzinfo=datetime.UTC))

    return at


def test_a_name_is_the_time_in_utc(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        now = datetime.datetime.now(datetime.UTC)
        stamp = datetime.datetime.strptime(begun(tmp_path)[:15] + "+0000", "%Y%m%d-%H%M%S%z")
        assert abs((stamp - now).total_seconds()) < 60
    finally:
        monkeypatch.undo()
        time.tzset()


def test_runs_of_one_second_and_of_a_clock_that_was_set_back_come_after_the_others(tmp_path, clock):
    clock(2026, 10, 25, 2, 59, 59)
    names = [begun(tmp_path), begun(tmp_path, "other"), begun(tmp_path)]
    clock(2026, 10, 25, 2, 0, 0)
    names += [begun(tmp_path) for _ in range(9)]
    clock(2026, 10, 25, 3, 0, 0)
    names.append(begun(tmp_path))
    assert names[:3] == [
        "20261025-025959-toy",
        "20261025-025959.0001-other",
        "20261025-025959.0002-toy",
    ]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert [folder.name for folder in journal.runs(tmp_path, "toy")] == [
        name for name in reversed(names) if name.endswith("-toy")
    ]


def test_a_recipe_whose_name_ends_as_another_begins_has_its_own_runs(tmp_path):
    begun(tmp_path, "toy-2")
    (tmp_path / "runs" / "notes").mkdir()
    assert journal.runs(tmp_path, "toy") == [] and len(journal.runs(tmp_path, "toy-2")) == 1
