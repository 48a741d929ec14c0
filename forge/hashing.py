"""SHA-256 of files, folders and artifacts; a file is read once, and again only when it has changed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# A file that was written within this time of being hashed may be written again with the same timestamps
# (the kernel's clock ticks every few milliseconds), so its digest is not remembered.
_SETTLE_NS = 100_000_000


def of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def of_value(value: Any) -> str:
    """Digest of a JSON value, whatever the order of its keys."""
    return of_text(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def of_entries(entries: Iterable[tuple[str, str]]) -> str:
    """Digest of a set of files, from (relative path, sha256) in any order."""
    return of_value(sorted(entries))


_TABLE = (
    "create table if not exists digest (device int, inode int, size int, mtime int, ctime int, sha256 text,"
    " primary key (device, inode)) without rowid"
)


class Memo:
    """File digests by device, inode, size, mtime and ctime, in one SQLite file.

    Losing the file costs time and nothing else: it is not synced, and on a full disk digests are
    remembered for this process alone.
    """

    def __init__(self, path: Path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = _connect(path)
        except (OSError, sqlite3.OperationalError) as fault:
            if not _full(fault):
                raise
            self._db = _connect(":memory:")

    def file(self, path: Path) -> str:
        """SHA-256 of a file's content; OSError if it cannot be read."""
        stat = os.stat(path)
        row = self._db.execute(
            "select sha256 from digest where device = ? and inode = ? and size = ? and mtime = ? and"
            " ctime = ?",
            _identity(stat),
        ).fetchone()
        if row:
            return str(row[0])
        with open(path, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            after = os.fstat(stream.fileno())
        settled = time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > _SETTLE_NS
        if settled and _identity(after) == _identity(stat):
            self.remember(after, sha256)
        return sha256

    def remember(self, stat: os.stat_result, sha256: str) -> None:
        try:
            self._db.execute(
                "insert or replace into digest values (?, ?, ?, ?, ?, ?)", (*_identity(stat), sha256)
            )
        except sqlite3.OperationalError as fault:
            if not _full(fault):
                raise

    def source(self, paths: Iterable[Path]) -> str:
        """Digest of the user's files and folders, in their order: names and content, not where they lie."""
        return of_value([self._tree(path) for path in paths])

    def _tree(self, path: Path) -> list[Any]:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file())
            return [path.name, of_entries((str(p.relative_to(path)), self.file(p)) for p in files)]
        return [path.name, self.file(path)]

    def close(self) -> None:
        self._db.close()


def _identity(stat: os.stat_result) -> tuple[int, int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _connect(path: Path | str) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=10, isolation_level=None)
    database.execute("pragma synchronous = off")
    database.execute(_TABLE)
    return database


def _full(fault: OSError | sqlite3.OperationalError) -> bool:
    """Whether something could not be written for want of room."""
    if isinstance(fault, OSError):
        return fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return fault.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)
