"""What a bench of training says of its steps, computed by hand."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from bench import figures


def test_a_run_times_the_steps_after_the_third_and_a_short_one_those_after_the_first():
    assert [list(range(n))[figures.counted(n)] for n in (1, 2, 3, 4, 6)] == [[0], [1], [1, 2], [3], [3, 4, 5]]


def test_median_percentile_speed_and_padding_are_of_the_timed_steps():
    times = [60.0, 9.0, 9.0] + [1.0] * 18 + [2.0, 3.0]
    found = figures.summary(times, [7, 7, 7] + [300] * 20, [1000] * 3 + [400] * 20)
    assert (found["timed"], found["ms"], found["p95_ms"]) == (20, 1000.0, 3000.0)
    assert (
        found["tokens_per_s"] == pytest.approx(6000 / 23)
        and found["padded"] == 0.25
        and len(found["all_ms"]) == 23
    )


def test_compilations_count_from_the_third_step_of_each_run(monkeypatch):
    knobs = SimpleNamespace(compilation=SimpleNamespace(listener=None))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(knobs=knobs))
    compilations = figures.Compilations()

    def run(compiled):
        for number, count in enumerate(compiled):
            for _ in range(count):
                knobs.compilation.listener(src=None)
            compilations.step(number)
        return compilations.after

    assert (
        run([5, 1, 1, 0]) == 0
        and run([2, 0, 0, 1, 2]) == 3
        and run([2, 9]) is None
        and run([1, 1, 1]) is None
    )


def test_the_start_of_a_process_is_known_from_within():
    began = time.time()
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import time; time.sleep(1); from bench import figures; print(figures.started())",
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert abs(float(said.stdout) - began) < 0.9, (
        "of the import, not of the process" if float(said.stdout) > began else "of another process"
    )


ROW = {
    "row": "ours",
    "lengths": "mixed",
    "first_s": 51.0,
    "timed": 57,
    "ms": 546.2,
    "p95_ms": 598.0,
    "tokens_per_s": 14461.0,
    "padded": 0.051,
    "peak_gb": 28.0,
}


def test_the_table_has_a_reason_where_a_row_could_not_run_and_no_column_that_none_fills():
    said = figures.table(
        [ROW | {"compiled": 0}, {"row": "peft-torch", "lengths": "voice", "why": "out of memory"}]
    ).splitlines()
    assert (
        " ".join(said[0].split())
        == "row lengths first s timed median ms p95 ms tokens/s padded compiled peak GB"
    )
    assert said[1].split() == ["ours", "mixed", "51.0", "57", "546", "598", "14,461", "5.1%", "0", "28.00"]
    assert said[2].split() == ["peft-torch", "voice", "out", "of", "memory"]
    assert figures.table([{"row": "peft", "lengths": "", "why": "out of memory"}]).splitlines()[
        1
    ].split() == ["peft", "out", "of", "memory"]


def test_a_figure_that_one_row_lacks_is_a_dash():
    assert figures.table([ROW, ROW | {"compiled": 3}]).splitlines()[1].split()[-2:] == ["-", "28.00"]
