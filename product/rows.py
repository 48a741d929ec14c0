"""What differs between two data sets (artifacts `chat-dataset`): rows added, removed and changed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

SPLITS = {"train.jsonl": False, "eval.jsonl": True}  # file -> whether it is held out
# A row without its tokens takes a few kB. Of more rows than this that are in one data set alone, the first
# are shown, and all are counted.
KEPT = 2_000
MOST_PAIRS = 20_000  # rows of one file are compared by their words as long as there are fewer pairs
ALIKE = 0.5  # share of the words that two rows have in common, from which one is the other after a change

_ID = re.compile(rb'\{"id": "([0-9a-f]+)"')


@dataclass(frozen=True)
class Row:
    file: str
    line: int
    messages: list[dict[str, Any]]
    tools: list[Any]

    @property
    def words(self) -> Counter[str]:
        """Of everything but the system prompt, which is the same in all rows."""
        spoken = (text(message) for message in self.messages if message["role"] != "system")
        return Counter(word for said in spoken for word in said.lower().split())


@dataclass(frozen=True)
class ChangedRow:
    """Where a row is now and was, and the first message that differs: `what` is its role, or `tools`."""

    file: str
    line: int
    line_then: int
    what: str
    then: str
    now: str


@dataclass(frozen=True)
class PlacedRow:
    """A row in one data set alone; `text` is what it begins with."""

    file: str
    line: int
    text: str


@dataclass(frozen=True)
class RowDifferences:
    """`same` rows are in both data sets. `moved` of them changed between training and held out. `uncompared`
    more rows are in one of the two alone.
    """

    same: int
    moved: int
    added: tuple[PlacedRow, ...]
    removed: tuple[PlacedRow, ...]
    changed: tuple[ChangedRow, ...]
    uncompared: int = 0


def text(message: dict[str, Any]) -> str:
    """What a message says and calls."""
    calls = (call.get("function", call) for call in message.get("tool_calls") or [])
    called = [f"{call['name']}({_arguments(call['arguments'])})" for call in calls]
    return " ".join([str(message.get("content") or ""), *called]).strip()


def _arguments(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def differences(then: Path, now: Path) -> RowDifferences:
    """Of the artifacts in two folders; they are read line by line. ValueError, LookupError or TypeError if a
    file is not as docs/formats.md has it.
    """
    before, after = _splits(then), _splits(now)
    removed, added = list(_rows(then, without=after)), list(_rows(now, without=before))
    both = before.keys() & after.keys()
    pairs = list(_paired(removed, added))
    paired = {id(row) for pair in pairs for row in pair}
    changed = [_change(*pair) for pair in pairs]
    return RowDifferences(
        same=len(both),
        moved=sum(before[row] != after[row] for row in both),
        added=tuple(_placed(row) for row in added if id(row) not in paired),
        removed=tuple(_placed(row) for row in removed if id(row) not in paired),
        changed=tuple(sorted(changed, key=lambda row: (row.file, row.line))),
        uncompared=sum(max(0, len(ids) - len(both) - KEPT) for ids in (before, after)),
    )


def _lines(folder: Path) -> Iterator[tuple[bytes, bytes, bool]]:
    """Id, line, and whether it is held out, of every row. The rest of a line is not read as JSON: most of it
    is tokens.
    """
    for name, held_out in SPLITS.items():
        with (folder / name).open("rb") as lines:
            for line in lines:
                start = _ID.match(line)
                yield (start[1] if start else str(json.loads(line)["id"]).encode()), line, held_out


def _splits(folder: Path) -> dict[bytes, bool]:
    return {row: held_out for row, _, held_out in _lines(folder)}


def _rows(folder: Path, without: dict[bytes, bool]) -> Iterator[Row]:
    """The first KEPT rows whose id is not among `without`."""
    left = KEPT
    for row, line, _ in _lines(folder):
        if row not in without and left:
            left -= 1
            values = json.loads(line)
            yield Row(values["file"], values["line"], values["messages"], values["tools"])


def _paired(removed: list[Row], added: list[Row]) -> Iterator[tuple[Row, Row]]:
    """Rows that are the same one before and after a change: of one file, with the same words for the most
    part or at the same line.
    """
    paired: set[int] = set()
    for file in dict.fromkeys(row.file for row in removed):
        old, new = ([row for row in rows if row.file == file] for rows in (removed, added))
        for then, now in [*_by_words(old, new), *_by_line(old, new)]:
            if paired.isdisjoint((id(then), id(now))):
                paired |= {id(then), id(now)}
                yield then, now


def _by_words(old: list[Row], new: list[Row]) -> list[tuple[Row, Row]]:
    """Pairs that share most of their words, those that share most first."""
    if len(old) * len(new) > MOST_PAIRS:
        return []
    words = {id(row): row.words for row in [*old, *new]}
    shared = [(_share(words[id(then)], words[id(now)]), then, now) for then, now in product(old, new)]
    shared.sort(key=lambda pair: (pair[0], pair[1].line == pair[2].line), reverse=True)
    return [(then, now) for share, then, now in shared if share >= ALIKE]


def _share(some: Counter[str], others: Counter[str]) -> float:
    return (some & others).total() / max(1, (some | others).total())


def _by_line(old: list[Row], new: list[Row]) -> Iterator[tuple[Row, Row]]:
    at = {row.line: row for row in new}
    return ((row, at[row.line]) for row in old if row.line in at)


def _change(then: Row, now: Row) -> ChangedRow:
    """The first message of two rows that differs."""
    for old, new in zip_longest(then.messages, now.messages):
        if old != new:
            what = (new or old)["role"]
            return _changed(then, now, what, text(old) if old else "", text(new) if new else "")
    return _changed(then, now, "tools", _names(then.tools), _names(now.tools))


def _changed(then: Row, now: Row, what: str, old: str, new: str) -> ChangedRow:
    return ChangedRow(now.file, now.line, then.line, what, old, new)


def _names(tools: list[Any]) -> str:
    return ", ".join(tool["function"]["name"] for tool in tools)


def _placed(row: Row) -> PlacedRow:
    spoken = [message for message in row.messages if message["role"] != "system"] or row.messages
    return PlacedRow(row.file, row.line, f"{spoken[0]['role']}: {text(spoken[0])}")
