"""SHA-256 of files, folders and artifacts; a file is read once, and again only when it has changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from forge import modes

# A file that was written within this time of being hashed may be written again with the same timestamps
# (the kernel's clock ticks every few milliseconds), so its digest is not remembered.
_SETTLE_NS = 100_000_000
_BLOCK = 8 << 20  # bytes of one read: large enough for a disk's full speed

Identity = tuple[int, int, int, int, int]


def of_text(text: str) -> str:
    """SHA-256 of a text. File names that are no UTF-8 count by their bytes."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def of_value(value: Any) -> str:
    """Digest of a JSON value, whatever the order of its keys."""
    return of_text(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def of_entries(entries: Iterable[tuple[str, str]]) -> str:
    """Digest of a set of files, from (relative path, sha256) in any order."""
    return of_value(sorted(entries))


def identity(status: os.stat_result) -> Identity:
    """What changes when a file's content may have: device, inode, size, mtime and ctime."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def of_content(
    path: Path, on_bytes: Callable[[int], None] = lambda count: None, from_disk: bool = False
) -> tuple[str, os.stat_result | None]:
    """SHA-256 of a file's content, read now, and the file's stat: None if it changed on the way.

    `on_bytes` is told of every block. `from_disk`: what the system's memory still holds of the file is not
    taken for it, which costs the next reader of the file the same again.
    """
    with open(path, "rb", buffering=0) as stream:
        before = os.fstat(stream.fileno())
        if from_disk:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest, block = hashlib.sha256(), bytearray(min(_BLOCK, max(1, before.st_size)))
        view = memoryview(block)
        while count := stream.readinto(block):
            digest.update(view[:count])
            on_bytes(count)
        after = os.fstat(stream.fileno())
    return digest.hexdigest(), after if identity(before) == identity(after) else None


def _settled(status: os.stat_result) -> bool:
    """Whether a write from now on would show in the file's times (a time to come differs from now, too)."""
    return abs(time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns)) > _SETTLE_NS


def files_of(path: Path) -> list[tuple[str, Path]]:
    """The files of a user's file or folder, sorted, each with its name, which begins with that of `path`."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [(str(file.relative_to(path.parent)), file) for file in files]


def settle(paths: Iterable[Path]) -> None:
    """Waits, 0.1 s at most, until what is read of these files can be remembered."""
    if not all(_settled(os.stat(path)) for path in paths):
        time.sleep(_SETTLE_NS / 1e9 + 0.005)


_TABLE = (
    "create table if not exists content (file text primary key, state text, sha256 text, mark text)"
    " without rowid"
)
# A file of other bytes than SQLite's, a damaged page, or another table than ours.
_DAMAGED = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT)


class Memo:
    """File digests by device, inode, size, mtime and ctime, in one SQLite file.

    Losing the file costs time and nothing else. So it is not synced, one that is damaged is made anew, and
    where it cannot be written (a full disk, another user's store) digests are remembered for this process
    alone. A row counts only with its own mark: a flipped bit in it makes a file be read again, and never
    makes a file count as changed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._own: dict[Identity, str] = {}
        self._db = self._connect()

    def known(self, status: os.stat_result) -> str | None:
        """The SHA-256 that a file with this stat had when it was last read; None if it was not read since
        it changed.
        """
        key = identity(status)
        if key in self._own:
            return self._own[key]
        rows = self._execute("select sha256, mark from content where file = ? and state = ?", _row(key))
        return str(rows[0][0]) if rows and rows[0][1] == _mark(key, str(rows[0][0])) else None

    def file(self, path: Path) -> str:
        """SHA-256 of a file's content; OSError if it cannot be read."""
        return self.known(os.stat(path)) or self.read(path)

    def read(self, path: Path) -> str:
        """The same, of content that is read now."""
        sha256, status = of_content(path)
        self.remember(status, sha256)
        return sha256

    def remember(self, status: os.stat_result | None, sha256: str) -> None:
        """Remembers what `of_content` gave, unless the file may yet change without a sign."""
        if status is None or not _settled(status):
            return
        key = identity(status)
        self._own[key] = sha256
        values = (*_row(key), sha256, _mark(key, sha256))
        self._execute("insert or replace into content values (?, ?, ?, ?)", values)

    def source(self, paths: Iterable[Path]) -> str:
        """Digest of the user's files and folders, in their order: names and content, not where they lie."""
        return of_value([self._tree(path) for path in paths])

    def _tree(self, path: Path) -> list[Any]:
        if path.is_dir():
            files = (file for _, file in files_of(path))
            return [path.name, of_entries((str(p.relative_to(path)), self.file(p)) for p in files)]
        return [path.name, self.file(path)]

    def close(self) -> None:
        self._db.close()

    def _execute(self, statement: str, values: tuple[Any, ...]) -> list[Any]:
        """The rows of a statement; none where the file cannot be read or written."""
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as fault:
            if _is_damage(fault):
                self._db.close()
                self._db = self._rebuilt()
            return []

    def _connect(self) -> sqlite3.Connection:
        with contextlib.suppress(OSError):
            modes.make_folder(self.path.parent)
            os.close(os.open(self.path, os.O_CREAT | os.O_NONBLOCK, modes.file_mode()))
            if not stat.S_ISREG(self.path.lstat().st_mode):
                return self._rebuilt()  # SQLite would wait for the other end of a FIFO
        try:
            return _opened(str(self.path))
        except sqlite3.Error as fault:
            if _is_damage(fault):
                return self._rebuilt()
        try:
            return _opened(f"{self.path.absolute().as_uri()}?mode=ro")
        except sqlite3.Error as fault:
            return self._in_memory(fault)

    def _rebuilt(self) -> sqlite3.Connection:
        try:
            for suffix in ("", "-journal", "-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            database = _opened(str(self.path))
        except (OSError, sqlite3.Error) as fault:
            return self._in_memory(fault)
        print(f"note: {self.path} was damaged and is made anew: files are read again once", file=sys.stderr)
        return database

    def _in_memory(self, fault: Exception) -> sqlite3.Connection:
        print(
            f"note: {self.path} cannot be used ({fault}): every command reads all files again",
            file=sys.stderr,
        )
        return _opened(":memory:")


def _row(key: Identity) -> tuple[str, str]:
    """Which file, and its state. As text: inodes and times may be larger than SQLite's integers."""
    device, inode, *state = map(str, key)
    return f"{device}:{inode}", ":".join(state)


def _mark(key: Identity, sha256: str) -> str:
    return of_value([*key, sha256])[:16]


def _is_damage(fault: sqlite3.Error) -> bool:
    return (getattr(fault, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF) in _DAMAGED


def _opened(place: str) -> sqlite3.Connection:
    """The memo at a path or SQLite URI. sqlite3.Error if it is damaged or may not be opened."""
    database = sqlite3.connect(place, timeout=10, isolation_level=None, uri=place.startswith("file:"))
    try:
        database.execute("pragma synchronous = off")
        database.execute(_TABLE)
        database.execute("select file, state, sha256, mark from content limit 1")
    except BaseException:
        database.close()
        raise
    return database
