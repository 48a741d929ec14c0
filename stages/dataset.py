"""JSON Lines files: every stage reads and writes rows with this module.

A row is one JSON object on one line, in UTF-8. Only the byte `\\n` ends a line. U+2028, U+2029 and U+0085 may
stand unescaped inside a JSON string, and str.splitlines would cut the row there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stages.job import StageError

BOM = b"\xef\xbb\xbf"


def lines(opened: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of every line that is not blank. A UTF-8 byte order mark at the start is
    removed.
    """
    for number, raw in enumerate(opened, 1):
        line = (raw.removeprefix(BOM) if number == 1 else raw).strip(b" \t\r\n")
        if line:
            yield number, line


def parse(raw: bytes | str) -> Any:
    """The JSON value of one row. Raises ValueError with a reason in words.

    Stricter than json.loads: it refuses NaN and Infinity, which JSON does not have, and an object with a
    repeated key, since one of the two values would be lost.
    """
    try:
        return DECODER.decode(raw.decode() if isinstance(raw, bytes) else raw)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start} ({error.reason})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {reason(error)}") from error


def reason(error: ValueError | RecursionError) -> str:
    """Why DECODER could not read a text, in words."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return (
        "an integer of thousands of digits" if "integer string conversion" in str(error) else str(error)
    )  # otherwise NaN or a repeated key


def read(path: Path, name: str = "", step: int = 1) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and row of every `step`-th row of a JSON Lines file.

    Raises StageError if a line holds no JSON object, or if the file cannot be read. The error names the line
    and `name` (default: the file's name).
    """
    name = name or path.name
    try:
        with path.open("rb") as opened:
            for count, (number, raw) in enumerate(lines(opened)):
                if count % step == 0:
                    yield number, _row(raw, f"{name}:{number}")
    except OSError as error:
        raise StageError(
            f"{name} cannot be read: {error.strerror or error}",
            "a file of rows",
            "Check the path in the recipe.",
        ) from error


def count(path: Path) -> int:
    """The number of rows of a JSON Lines file. No row is parsed."""
    with path.open("rb") as opened:
        return sum(1 for _ in lines(opened))


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes `rows` as JSON Lines in UTF-8. Raises ValueError for NaN or Infinity, which are not JSON."""
    with path.open("wb") as opened:
        for row in rows:
            opened.write(dumps(row).encode() + b"\n")


def dumps(row: dict[str, Any]) -> str:
    """A row as JSON on one line. Half a surrogate pair cannot be written in UTF-8, so such a row is written
    in ASCII with JSON escapes.
    """
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(row, allow_nan=False)
    return text


def _row(raw: bytes, place: str) -> dict[str, Any]:
    try:
        row = parse(raw)
    except ValueError as error:
        raise StageError(
            f"{place} is no row: {error}",
            "one JSON object on every line, in UTF-8",
            "Mend or remove that line.",
        ) from error
    if not isinstance(row, dict):
        raise StageError(
            f"{place} holds a JSON {type(row).__name__}",
            "one JSON object on every line",
            "Mend or remove that line.",
        )
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} stands twice in one object")
            seen.add(key)
    return mapping


# the decoder of `parse`
DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object_without_repeats)
