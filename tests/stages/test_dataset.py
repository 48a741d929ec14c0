"""Rows in files: a line ends at the byte \\n alone, and every stage reads and writes rows by one module."""

import json
import re
from pathlib import Path

import pytest

from stages import dataset
from stages.base import make
from stages.conversations import files, rows
from stages.evaluate import asked as evaluate_asked
from stages.evaluate import questions
from stages.job import Job, StageError
from stages.merge import proof
from stages.quantize import calibrate, fidelity
from stages.train import fit

REPO = Path(__file__).resolve().parents[2]
SEPARATORS = "note:\u2028buy\u2029milk\u0085now\x1cor later"  # each ends a line for str.splitlines
ROWS = [
    {
        "id": str(n),
        "category": "c",
        "tools": [],
        "input_ids": [n, 5, 6, 7],
        "labels": [-100, 5, 6, 7],
        "text": SEPARATORS,
        "messages": [
            {"role": "user", "content": SEPARATORS},
            {"role": "assistant", "content": f"Noted {n}. {SEPARATORS}"},
        ],
    }
    for n in range(3)
]


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "data" / "eval.jsonl"
    path.parent.mkdir()
    dataset.write(path, ROWS)
    return path


def test_a_row_with_every_separator_of_lines_is_written_raw_and_read_back(written):
    assert SEPARATORS.encode()[5:8] in written.read_bytes() and written.read_bytes().count(b"\n") == 3
    assert list(dataset.read(written)) == list(enumerate(ROWS, 1)) and dataset.count(written) == 3


def job(path, **sources):
    return Job(
        "evaluate",
        {},
        {"data": path.parent},
        path.parent,
        path.parent,
        0,
        {k: [v] for k, v in sources.items()},
    )


def asked(path):
    """The messages of questions that the rows are made into."""
    dataset.write(
        path,
        [
            {"id": str(n), "category": "a", "messages": row["messages"][:1], "expect": {}}
            for n, row in enumerate(ROWS)
        ],
    )
    return [question.row["messages"] for question in questions.read(path)[0]]


CONSUMERS = {
    "data": lambda path: (
        [row.messages for row in rows.read(files.list_files([path]).files[0])]
        == [row["messages"] for row in ROWS]
    ),
    "base: lessons": lambda path: make.read_lessons([path]) == ROWS,
    "train": lambda path: [row["input_ids"][0] for row in fit.read_rows(path)] == [0, 1, 2],
    "merge: proof": lambda path: (
        [ids[0].item() for ids in proof.sample_conversations(path, 100)] == [0, 1, 2]
    ),
    "quantize: calibration": lambda path: (
        [ids[0].item() for ids in calibrate.conversations(path, 8, 100)] == [0, 1, 2]
    ),
    "quantize: fidelity": lambda path: (
        [ids[0].item() for ids, _ in fidelity.held_out_rows(path, 100)] == [0, 1, 2]
    ),
    "evaluate: questions": lambda path: (
        asked(path.with_name("questions.jsonl")) == [row["messages"][:1] for row in ROWS]
    ),
    "evaluate: held out": lambda path: (
        [q["messages"] for q in evaluate_asked.load(job(path), {})] == [row["messages"][:1] for row in ROWS]
    ),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_row_with_line_separators_is_one_row_for_every_stage(written, consumer):
    assert CONSUMERS[consumer](written)


def test_no_stage_reads_or_writes_rows_but_through_the_one_module():
    """Seven readers were three too many that cut rows; the next one shall not come back unseen."""
    for path in sorted((REPO / "stages").rglob("*.py")):
        text = path.read_text()
        assert path.name == "dataset.py" or not re.search(r"json\.loads\(line\)|json\.loads\(raw\)", text), (
            path
        )
        assert path.name in ("memory.py",) or not re.search(r"read_text\([^)]*\)\.splitlines\(\)", text), path


def test_calibration_takes_conversations_from_the_whole_file(tmp_path):
    dataset.write(tmp_path / "train.jsonl", ({"input_ids": [n] * 5} for n in range(100)))
    chosen = calibrate.conversations(tmp_path / "train.jsonl", 8, 3)
    assert [ids.tolist() for ids in chosen] == [[n] * 3 for n in range(0, 96, 12)]


BAD = {
    b"{": "not JSON: Expecting property name",
    b"[1, 2]": "holds a JSON list",
    b'{"a": NaN}': "NaN is no JSON value",
    b'{"a": {"content": 1, "content": 2}}': "the key 'content' stands twice",
    b'{"a": "\xe0\xb2"}': "not UTF-8: byte 0xe0 at 7",
    b"[" * 100_000: "nested too deeply",
    b'{"a": ' + b"1" * 5000 + b"}": "an integer of thousands of digits",
}


@pytest.mark.parametrize("raw", BAD, ids=[str(raw[:12]) for raw in BAD])
def test_a_bad_line_is_named_by_file_and_line(tmp_path, raw):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n\n' + raw + b"\n")
    reader = dataset.read(tmp_path / "rows.jsonl")
    assert next(reader) == (1, {"a": 1}), "rows before it are given as they come"
    with pytest.raises(StageError, match=rf"rows.jsonl:3 .*{re.escape(BAD[raw])}"):
        next(reader)


def test_bom_crlf_blank_lines_and_no_last_newline_are_no_part_of_a_row(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n \t\r\n{"a": 2}')
    assert list(dataset.read(tmp_path / "rows.jsonl")) == [(1, {"a": 1}), (3, {"a": 2})]


def test_a_file_that_cannot_be_read_is_a_finding(tmp_path):
    with pytest.raises(StageError, match="questions cannot be read: Is a directory"):
        next(dataset.read(tmp_path, "questions"))


def test_half_a_surrogate_pair_is_written_as_an_escape_and_nan_not_at_all(tmp_path):
    dataset.write(tmp_path / "rows.jsonl", [{"a": "\ud83d"}, {"a": "ಕ"}])
    assert (tmp_path / "rows.jsonl").read_bytes() == b'{"a": "\\ud83d"}\n' + json.dumps(
        {"a": "ಕ"}, ensure_ascii=False
    ).encode() + b"\n"
    with pytest.raises(ValueError):
        dataset.write(tmp_path / "rows.jsonl", [{"a": float("nan")}])
