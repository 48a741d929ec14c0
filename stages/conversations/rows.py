"""Reads conversations: every record of a file becomes a row, or a reject with its reason."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from model.families.messages import ChatError, normalise, served_tools
from stages import job
from stages.conversations import formats, records
from stages.conversations.files import HELD_OUT, WITH_TRAIN, File, Listing
from stages.job import StageError

HEAD = 200  # characters of a bad row that rejects.jsonl keeps
MOST_REJECTS = 1_000_000  # of one file, which are held in memory


@dataclass(frozen=True)
class Row:
    """A conversation in canonical form. `split` is the held-out split that the file or the row's key `split`
    names, or "".
    """

    file: str
    line: int
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    category: str
    head: str
    format: str = "messages"
    split: str = ""
    unused: tuple[str, ...] = ()

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of messages and tools. Equal rows may differ in file, line and category."""
        return hashlib.sha256(_json_text([self.messages, self.tools]).encode()).hexdigest()

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.file}:{self.line}"

    @property
    def prompt(self) -> str:
        """The system prompt, or ""."""
        first = self.messages[0]
        return first["content"] if first["role"] == "system" else ""


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used, and why. `head` is the start of its text."""

    file: str
    line: int
    reason: str
    head: str


@dataclass
class Gathered:
    """All rows of all files in their order, and the rejects."""

    rows: list[Row] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    @property
    def total(self) -> int:
        return len(self.rows) + len(self.rejects)


def gather(listing: Listing) -> Gathered:
    """Reads every file of a listing. A file of a folder that is a single JSON object but no conversation is
    added to the files left out.
    """
    gathered = Gathered()
    for number, file in enumerate(listing.files, 1):
        results = list(_within_limit(file))
        if _describes_data_set(file, results):
            listing.left_out[file.name] = "is one JSON object and no conversation"
            continue
        gathered.rows += [row for row in results if isinstance(row, Row)]
        gathered.rejects += [reject for reject in results if isinstance(reject, Reject)]
        job.progress(number, len(listing.files), "file", f"{len(gathered.rows)} rows")
    return gathered


def _within_limit(file: File) -> Iterator[Row | Reject]:
    """`read`. Raises StageError if a file has more than MOST_REJECTS rejects."""
    rejects = 0
    for result in read(file):
        if isinstance(result, Reject) and (rejects := rejects + 1) > MOST_REJECTS:
            raise StageError(
                f"{file.name} has more than {MOST_REJECTS} rows that cannot be used, the last at line"
                f" {result.line}: {result.reason}",
                "a file of conversations",
                "Name the right file, or remove such rows.",
            )
        yield result


def read(file: File) -> Iterator[Row | Reject]:
    """Every record of one file, as a row or a reject."""
    for record in records.records(file.path, file.name, file.kind):
        head = record.head.decode("utf-8", "replace")[:HEAD]
        try:
            if record.fault:
                raise ChatError(record.fault)
            yield _row(record.value, file, record.line, head)
        except ChatError as error:
            yield Reject(file.name, record.line, str(error), head)


def without_duplicates(rows: list[Row]) -> tuple[list[Row], int, int]:
    """The rows without exact duplicates, the number of duplicates, and the number of training rows that were
    removed because they are also held out.
    """
    held_out = {row.digest for row in rows if row.split}
    digests: set[str] = set()
    distinct, overlap = [], 0
    for row in rows:
        if not row.split and row.digest in held_out:
            overlap += 1
        elif row.digest not in digests:
            digests.add(row.digest)
            distinct.append(row)
    return distinct, len(rows) - len(distinct) - overlap, overlap


def unused_keys(rows: list[Row]) -> dict[str, int]:
    """Unused key -> number of rows that have it, the most frequent first."""
    return dict(Counter(key for row in rows for key in row.unused).most_common())


def _row(value: Any, file: File, line: int, head: str) -> Row:
    """One row in canonical form. Raises ChatError with the reason if it cannot be used."""
    conversation = formats.canonical(value)
    split = str(value.get("split") or "").lower()
    row = Row(
        file.name,
        line,
        normalise(conversation.messages),
        served_tools(conversation.tools) or None,
        str(value.get("category") or file.stem),
        head,
        conversation.format,
        file.split or (split if split in HELD_OUT | WITH_TRAIN else ""),
        conversation.unused,
    )
    try:
        _json_text([row.messages, row.tools, row.category]).encode()
    except UnicodeEncodeError as error:
        raise ChatError("half a surrogate pair: a character was cut in two") from error
    except (TypeError, ValueError) as error:  # Parquet may hold dates and NaN
        raise ChatError(f"a value that JSON does not have: {error}") from error
    except RecursionError as error:
        raise ChatError("nested too deeply") from error
    return row


def _describes_data_set(file: File, results: list[Row | Reject]) -> bool:
    """Whether a file of a folder only describes the data set, as dataset_info.json does."""
    return (
        file.in_folder
        and len(results) == 1
        and isinstance(results[0], Reject)
        and results[0].reason.startswith(formats.NO_FORMAT)
        and file.path.suffix.lower() == ".json"
        and results[0].head.startswith("{")
    )


def _json_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
