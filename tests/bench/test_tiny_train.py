"""The bench of the tiny recipe's training runs, both rows in turn, and counts what each computes."""

import json
import os
import sys

import pytest

from bench import figures, lengths, tiny_train


def test_both_rows_take_their_steps_on_the_samples_lengths(capfd):
    tiny_train.main(["--lengths", "sample", "--steps", "2", "--block", "1"])
    head, columns, theirs, ours = capfd.readouterr().out.splitlines()
    assert head.startswith("sample lengths, 2 steps of 8 conversations, 2 threads on ")
    assert " ".join(columns.split()) == "row lengths first s timed median ms p95 ms tokens/s padded peak GB"
    assert theirs.startswith("TRL and PEFT  sample") and ours.startswith("stage train   sample")
    assert "0.0%" in ours.split() and "0.0%" not in theirs.split(), (
        "a packed step pads nothing, a batch of uneven conversations does"
    )


def test_a_row_that_dies_ends_the_bench_and_leaves_no_process(monkeypatch):
    monkeypatch.setattr(tiny_train, "base", lambda folder: None)  # an empty folder is no base
    with pytest.raises(SystemExit, match="TRL and PEFT: its process ended with 1 in block 1"):
        tiny_train.main(["--steps", "1", "--block", "1"])


def test_steps_that_are_no_whole_blocks_are_refused():
    with pytest.raises(SystemExit, match="--steps 15 --block 10: expected steps in whole blocks"):
        tiny_train.main(["--steps", "15"])


def test_the_rows_are_the_conversations_of_the_steps_that_were_drawn():
    rows = tiny_train.rows("sample", 3)
    assert [len(row["input_ids"]) for row in rows] == [
        length for step in lengths.plan("sample", 3) for length in step
    ]
    assert [row["number"] for row in rows] == list(range(24)) and all(
        len(row["labels"]) == len(row["input_ids"]) for row in rows
    )


def test_waiting_for_the_other_row_is_not_timed(monkeypatch):
    clock, read, write = [50.0], *os.pipe()
    monkeypatch.setattr(tiny_train.time, "perf_counter", lambda: clock[0])

    def wait():
        clock[0] += 100
        return "\n"

    monkeypatch.setattr(sys, "stdin", type("Other", (), {"readline": staticmethod(wait)}))
    turns = tiny_train.Turns(2, write)
    # a batch is collated before its step
    turns.tokens, turns.computed = [10, 10, 10, 10, 99], [20, 10, 10, 10, 99]
    for _ in range(4):
        clock[0] += 1
        turns.step()
    assert turns.times == [1, 1, 1, 1]
    first, second = (json.loads(line) for line in os.read(read, 4096).splitlines())
    assert (
        (first["timed"], second["timed"]) == (1, 1) and second["tokens_per_s"] == 10 and second["padded"] == 0
    )
    assert figures.WARM == 3
