"""What a power cut may leave of a folder, at every file operation of this process.

The model is the strictest that POSIX allows. A file has the content and mode of its last fsync; what was
written since is lost, cut in half, zeros, or there. A folder lists what it did at its last fsync, or what it
lists now, each folder by itself.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

File = tuple[bytes, int]  # content and mode
Listing = dict[str, int]  # inode by name
Tree = tuple[tuple[str, bytes | None, int], ...]  # path, content (None: a folder), mode

OPERATIONS = ("fsync", "sync", "rename", "replace", "mkdir", "unlink", "remove", "rmdir", "chmod", "open")


def _there(content: bytes) -> bytes:
    return content


LOST: dict[str, Callable[[bytes], bytes]] = {
    "lost": lambda content: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "there": _there,
}


@dataclass(frozen=True)
class Cut:
    """What the power leaves if it is cut at `moment`; `marks` is how often `Disk.mark` was called by then."""

    tree: Tree
    marks: int
    moment: str

    def laid_out(self, folder: Path) -> Path:
        """Makes `folder` what the power cut left."""
        for path, content, mode in self.tree:
            if content is None:
                (folder / path).mkdir(parents=True)
            else:
                (folder / path).write_bytes(content)
                (folder / path).chmod(mode)
        return folder


class Disk:
    """The folder `root`, as it is and as it is known to survive. All that is there at first survives."""

    def __init__(self, root: Path):
        self.root = root
        self.held: dict[int, int] = {}  # inode -> descriptor, so that no inode is used again
        self.files: dict[int, File] = {}
        self.folders: dict[int, Listing] = {}
        self.cuts: dict[tuple[Tree, int], Cut] = {}
        self.marks = 0
        self._look()
        self.sync()

    def mark(self) -> None:
        """What is left from now on has one more mark."""
        self.marks += 1

    def close(self) -> None:
        for descriptor in self.held.values():
            os.close(descriptor)

    def sync(self) -> None:
        for inode in self.held:
            self._keep(inode)

    def fsync(self, descriptor: int) -> None:
        self._look()
        if (inode := os.fstat(descriptor).st_ino) in self.held:
            self._keep(inode)

    def cut(self, moment: str) -> None:
        """Records every tree that a power cut may leave now."""
        self._look()
        now = {inode: self._listing(inode) for inode in self.held if self._is_folder(inode)}
        unsynced = [inode for inode, listing in now.items() if self.folders.get(inode, {}) != listing]
        choices = [set(), set(unsynced), *({i} for i in unsynced), *(set(unsynced) - {i} for i in unsynced)]
        for named, lost in LOST.items():
            for new in choices:
                tree = tuple(self._tree(os.stat(self.root).st_ino, "", now, new, lost))
                told = f"{moment}; unsynced content {named}, {len(new)} of {len(unsynced)} folders as now"
                self.cuts.setdefault((tree, self.marks), Cut(tree, self.marks, told))

    def _tree(
        self,
        folder: int,
        path: str,
        now: dict[int, Listing],
        new: set[int],
        lost: Callable[[bytes], bytes],
    ) -> Iterator[tuple[str, bytes | None, int]]:
        yield path, None, 0o700
        for name, inode in sorted((now if folder in new else self.folders).get(folder, {}).items()):
            if inode in now:
                yield from self._tree(inode, os.path.join(path, name), now, new, lost)
                continue
            content, mode = self._file(inode)
            if lost is not _there:
                content, mode = self.files.get(inode, (lost(content), mode))
            yield os.path.join(path, name), content, mode

    def _look(self) -> None:
        """Takes hold of every inode that is new."""
        waiting = [self.root]
        while waiting:
            path = waiting.pop()
            with contextlib.suppress(FileNotFoundError):  # a stage removes files of its own
                status = os.lstat(path)
                if status.st_ino not in self.held:
                    self.held[status.st_ino] = os.open(path, os.O_PATH | os.O_NOFOLLOW)
                if stat.S_ISDIR(status.st_mode):
                    waiting += path.iterdir()

    def _keep(self, inode: int) -> None:
        if self._is_folder(inode):
            self.folders[inode] = self._listing(inode)
        else:
            self.files[inode] = self._file(inode)

    def _is_folder(self, inode: int) -> bool:
        return stat.S_ISDIR(os.fstat(self.held[inode]).st_mode)

    def _listing(self, inode: int) -> Listing:
        with os.scandir(f"/proc/self/fd/{self.held[inode]}") as entries:
            return {entry.name: entry.inode() for entry in entries}

    def _file(self, inode: int) -> File:
        status = os.fstat(self.held[inode])
        path = Path(f"/proc/self/fd/{self.held[inode]}")
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        return content, stat.S_IMODE(status.st_mode)


@contextlib.contextmanager
def recorded(root: Path, also: tuple[tuple[object, str], ...] = ()) -> Iterator[Disk]:
    """Records what a power cut may leave of `root` before and after each operation on files of this process:
    those of `os`, and the functions that `also` names by their module.
    """
    with contextlib.ExitStack() as stack:
        disk = Disk(root)
        stack.callback(disk.close)
        busy = False

        def unseen(look: Callable[..., None], *arguments: object) -> None:
            """Looking at the folder is no operation of the code that is recorded."""
            nonlocal busy
            busy = True
            try:
                look(*arguments)
            finally:
                busy = False

        def spied(name: str, real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                if busy:
                    return real(*arguments, **options)
                told = f"{name} {' '.join(map(str, arguments))}".replace(str(root), "")
                unseen(disk.cut, f"before {told}")
                result = real(*arguments, **options)
                if name in ("fsync", "sync"):
                    unseen(getattr(disk, name), *arguments)
                unseen(disk.cut, f"after {told}")
                return result

            return call

        for module, name in [*((os, name) for name in OPERATIONS), *also]:
            real = getattr(module, name)
            stack.callback(setattr, module, name, real)
            setattr(module, name, spied(name, real))
        yield disk
        unseen(disk.cut, "at the end")
