"""What the user's files were when an artifact was made from them: names, digests and, of texts, a mark for
each line.

It stands in the manifest and in no key. With it a change is told by file and line; the files are not kept.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from forge.hashing import Memo, files_of

# Of a larger file only the digest is kept: a mark takes 9 bytes of a manifest that every command reads.
LARGEST = 20_000_000  # bytes
MOST_LINES = 20_000
MARK = 8  # hexadecimal digits
RANGES = 6  # of lines that one phrase names

Entry = dict[str, str]  # name, sha256 and, of a text, lines: the marks with a blank between them


def described(memo: Memo, paths: Iterable[Path]) -> list[Entry]:
    """An entry for each file of a source, in the order of `Memo.source`. A name begins with the source's."""
    return [
        {"name": name, "sha256": memo.file(file), **_marks(file)}
        for path in paths
        for name, file in files_of(path)
    ]


def _marks(file: Path) -> dict[str, str]:
    if file.stat().st_size > LARGEST:
        return {}
    content = file.read_bytes()
    if b"\0" in content:  # Parquet, gzip, UTF-16: no lines to speak of
        return {}
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if len(lines) > MOST_LINES:
        return {}
    return {"lines": " ".join(hashlib.sha256(line).hexdigest()[:MARK] for line in lines)}


def fault(sources: Any) -> str:
    """Why `sources` is not what a manifest holds, a map of lists of entries ("" if it is)."""
    if not isinstance(sources, dict):
        return "sources that are no map"
    for name, entries in sources.items():
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            return f"sources of {name!r} that are no list of files"
    return ""


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        return False
    return set(entry) in ({"name", "sha256"}, {"name", "sha256", "lines"})


def differences(old: Sequence[Entry], new: Sequence[Entry]) -> tuple[str, ...]:
    """What changed in the files of a source, a phrase for each file. Lines that were removed are counted as
    they were, all others as they are now.
    """
    before, after = ({entry["name"]: entry for entry in entries} for entries in (old, new))
    phrases = []
    for name in {**before, **after}:
        then, now = before.get(name), after.get(name)
        if then is None or now is None:
            phrases.append(f"{name} is {'new' if then is None else 'gone'}")
        elif then["sha256"] != now["sha256"]:
            lines = _lines(then["lines"], now["lines"]) if "lines" in then and "lines" in now else ""
            phrases.append(f"{name}: {lines or 'other content'}")
    return tuple(phrases) or ("the same files in another order",)


def _lines(old: str, new: str) -> str:
    """`line 12 changed, lines 61-63 added`; "" if only the end of the last line changed."""
    changed, added, removed = list[int](), list[int](), list[int]()
    for kind, a, a_end, b, b_end in difflib.SequenceMatcher(None, old.split(), new.split()).get_opcodes():
        if kind != "equal":
            both = min(a_end - a, b_end - b)
            changed += range(b + 1, b + both + 1)
            added += range(b + both + 1, b_end + 1)
            removed += range(a + both + 1, a_end + 1)
    verbs = {"changed": changed, "added": added, "removed": removed}
    return ", ".join(f"{_ranges(numbers)} {verb}" for verb, numbers in verbs.items() if numbers)


def _ranges(numbers: list[int]) -> str:
    """`line 12`, `lines 3, 7-9`. Of many ranges, the first ones and how many lines the others are."""
    grouped = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in grouped]
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs[:RANGES]]
    more = sum(map(len, runs[RANGES:]))
    return f"line{'s' * (len(numbers) > 1)} {', '.join(shown)}" + (f" and {more} more" if more else "")
