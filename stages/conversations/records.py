"""Reads the records of a file whose kind is known (content.py), within bounded memory."""

from __future__ import annotations

import contextlib
import gzip
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO

from model.families import limits
from stages import dataset
from stages.conversations import content
from stages.job import StageError

WHOLE_BYTES = 500_000_000  # of one line, or of a JSON text that is no JSON Lines: it is read as a whole
# What a packed file may unpack to: rows that repeat a long prompt reach a hundredfold, a bomb a thousandfold.
ROOM_BYTES, RATIO = 10_000_000, 200
# Parquet stores a value once, however many rows hold it. Rows are decoded a batch at a time.
BATCH, BATCH_BYTES = 256, 2**32
HEAD_OF_ROW = 800  # bytes of a row that are kept to show it in a reject
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Record:
    """One row of a file. `line` counts from 1: it is the line in JSON Lines, else the number of the row.

    `value` is the JSON value. If it could not be read, `value` is None and `fault` says why. `head` is the
    start of the row's text.
    """

    line: int
    value: Any
    fault: str = ""
    head: bytes = b""


def records(path: Path, name: str, kind: content.Kind) -> Iterator[Record]:
    """Every record of a file whose kind is known. Raises StageError if the rest cannot be read: torn, or in
    another encoding.
    """
    with content.as_stage_errors(name):
        if kind.name == content.PARQUET:
            yield from _parquet_records(path, name)
        elif kind.name in (content.JSON, content.TEXT):
            yield from _json_records(path, name, kind)


def _json_records(path: Path, name: str, kind: content.Kind) -> Iterator[Record]:
    """The records of JSON text: one per line, the elements of an array, or objects over several lines."""
    lines = _numbered_lines(path, name, kind)
    if (numbered := next(lines, None)) is None:  # blank beyond its first bytes, or in its own encoding
        return
    first = numbered[1]
    following = next(lines, None)
    try:
        value = dataset.parse(first)
    except ValueError:
        multi_line = first[:1] == b"[" or (following is not None and _spans_lines(path, name, kind))
    else:
        multi_line = isinstance(value, list) and following is None
    if multi_line:
        yield from _value_records(_full_text(path, name, kind), name)
    else:
        yield from (_line_record(number, raw) for number, raw in _numbered_lines(path, name, kind))


class _Allowance:
    """Bytes that a packed file may still unpack to. `spend` raises StageError beyond."""

    def __init__(self, path: Path, name: str):
        self.name, self.size = name, path.stat().st_size
        self.left = ROOM_BYTES + RATIO * self.size

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise StageError(
                f"{self.name} has {self.size} bytes and unpacks to more than {RATIO} times as many",
                "conversations, which repeat themselves less",
                "If it is what you want to train on, unpack it and save it as JSON Lines.",
            )


class _Unpacked(io.RawIOBase):
    """The content of a gzip file, within its allowance."""

    def __init__(self, path: Path, name: str):
        self._packed, self._allowance = gzip.open(path), _Allowance(path, name)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._packed.readinto(buffer)
        self._allowance.spend(count)
        return count

    def close(self) -> None:
        self._packed.close()
        super().close()


@contextlib.contextmanager
def _open(path: Path, name: str, kind: content.Kind) -> Iterator[BinaryIO]:
    with io.BufferedReader(_Unpacked(path, name)) if kind.packed else path.open("rb") as opened:
        yield opened


def _numbered_lines(path: Path, name: str, kind: content.Kind) -> Iterator[tuple[int, bytes]]:
    """Number and UTF-8 bytes of every line. UTF-8 is not decoded here, so one bad line is one reject and does
    not stop the file.
    """
    with _open(path, name, kind) as opened:
        if kind.encoding.startswith("utf-8") and kind.newline == "\n":
            yield from dataset.lines(_lines(opened, name))
        else:
            text = io.TextIOWrapper(opened, kind.encoding, newline=kind.newline)
            yield from dataset.lines(line.encode() for line in _lines(text, name))


def _lines(opened: IO[AnyStr], name: str) -> Iterator[AnyStr]:
    """Every line. Raises StageError for one that is too long to be read as a whole."""
    while line := opened.readline(WHOLE_BYTES + 1):
        if len(line) > WHOLE_BYTES:
            raise _too_large(f"{name} has a line")
        yield line


def _full_text(path: Path, name: str, kind: content.Kind) -> str:
    with _open(path, name, kind) as opened:
        raw = opened.read(WHOLE_BYTES + 1)
    if len(raw) > WHOLE_BYTES:
        raise _too_large(f"{name} is one JSON text")
    return raw.decode(kind.encoding)


def _too_large(subject: str) -> StageError:
    return StageError(
        f"{subject} of more than {WHOLE_BYTES // 1_000_000} MB",
        "JSON Lines, one conversation a line",
        "Save it as JSON Lines or Parquet, which are read a row at a time.",
    )


def _spans_lines(path: Path, name: str, kind: content.Kind) -> bool:
    """Whether the first object of a text is complete over several lines. Its first line alone is not JSON."""
    try:
        dataset.DECODER.raw_decode(_full_text(path, name, kind).lstrip())
    except (ValueError, RecursionError):
        return False
    return True


def _value_records(text: str, name: str) -> Iterator[Record]:
    """The elements of an array, or consecutive objects, numbered from 1. Raises StageError if one is not
    JSON.
    """
    array = text.lstrip().startswith("[")
    position, number = text.index("[") + 1 if array else 0, 0
    while (position := _after_blanks(text, position)) < len(text):
        if array and text[position] == "]":
            break
        if array and number:
            if text[position] != ",":
                raise StageError(
                    f"{name}: no comma after row {number} of the array, at line"
                    f" {_line_number(text, position)}",
                    "JSON throughout",
                    "Mend it there.",
                )
            position = _after_blanks(text, position + 1)
        number += 1
        try:
            value, end = dataset.DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            place = getattr(error, "pos", position)
            if not text[place:].strip(" \t\r\n") or "Unterminated" in str(
                error
            ):  # an unterminated string extends to the end of the text
                raise StageError(
                    f"{name}: the text ends inside row {number}: the file was cut off",
                    "a whole JSON array",
                    "Copy or write the file again.",
                ) from error
            raise StageError(
                f"{name}: row {number} is no JSON ({dataset.reason(error)}), at line"
                f" {_line_number(text, place)} of the file",
                "JSON throughout",
                "Mend it there. In JSON Lines, one object a line, one bad row does not stop the others.",
            ) from error
        yield Record(
            number, value, "", text[position : min(end, position + HEAD_OF_ROW)].encode("utf-8", "replace")
        )
        position = end
    if array and position == len(text):
        raise StageError(
            f"{name}: the array has no end after row {number}: the file was cut off",
            "a whole JSON array",
            "Copy or write the file again.",
        )
    if array and text[position + 1 :].strip():
        raise StageError(
            f"{name}: more text follows the array, at line {_line_number(text, position)}",
            "one JSON array, or JSON Lines",
            "Put all rows into one array.",
        )


def _after_blanks(text: str, position: int) -> int:
    return _BLANK.match(text, position).end()  # type: ignore[union-attr]


def _line_number(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _line_record(number: int, raw: bytes) -> Record:
    head = raw[:HEAD_OF_ROW]
    if b"\0" in raw:
        return Record(number, None, "NUL bytes: the file was cut off while it was written", head)
    try:
        return Record(number, dataset.parse(raw), "", head)
    except ValueError as error:
        return Record(number, None, str(error), head)


def _parquet_records(path: Path, name: str) -> Iterator[Record]:
    """The rows of a Parquet file. Arrow gives all objects of a column the same keys, so here null means an
    absent key; such keys are removed.
    """
    import pyarrow.parquet

    number, allowance = 0, _Allowance(path, name)
    with pyarrow.parquet.ParquetFile(path) as table:
        batches = table.iter_batches(BATCH)
        while rows := _next_rows(batches, name, allowance):
            for row in rows:
                number += 1
                value = _without_nulls(row)
                yield Record(number, value, "", str(value)[:HEAD_OF_ROW].encode("utf-8", "replace"))


def _next_rows(batches: Iterator[Any], name: str, allowance: _Allowance) -> list[Any]:
    """The rows of the next batch, none at the end. Raises StageError if they take too much memory."""
    try:
        with limits.memory(BATCH_BYTES):
            if (batch := next(batches, None)) is None:
                return []
            allowance.spend(batch.nbytes)
            return list(batch.to_pylist(maps_as_pydicts="strict"))
    except MemoryError as error:
        raise StageError(
            f"{BATCH} rows of {name} take more than {BATCH_BYTES // 2**30} GB of memory",
            "conversations",
            "Find the rows that are so large, or name the right file.",
        ) from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
