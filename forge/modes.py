"""Files and folders that forge writes: who may read them, and that they outlast a power cut.

Artifacts, logs and scripts hold conversations. So they are their user's alone, or with ANNIE_SHARED=1 the
user's group may read them too, whatever the umask is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from forge.finding import Finding, warning

SHARED = "ANNIE_SHARED"


def shared() -> bool:
    """Whether this machine's settings let the group read."""
    return os.environ.get(SHARED) == "1"


def umask() -> int:
    """The umask of build.py and of the processes that it starts."""
    return 0o027 if shared() else 0o077


def folder_mode() -> int:
    return 0o777 & ~umask()


def file_mode() -> int:
    return 0o666 & ~umask()


def make_folder(folder: Path) -> Path:
    """Makes a folder, and those above it that are missing, for those who may read. Gives it back. A power
    cut leaves what was made.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(folder_mode(), exist_ok=True)
        folder.chmod(folder_mode())
        sync(folder.parent)
    return folder


def sync(path: Path) -> None:
    """Waits until the disk holds a file's content and mode, or a folder's list of names."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if not path.is_dir():
            raise
        os.sync()  # a folder that one may enter, and not list, cannot be opened: all disks are waited for
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_file(path: Path, mode: str, **options: Any) -> IO[Any]:
    """`open` for writing, of a file for those who may read."""
    stream = open(path, mode, opener=lambda name, flags: os.open(name, flags, file_mode()), **options)
    _set(path, file_mode())
    return stream


def write(path: Path, text: str, executable: bool = False) -> None:
    """Writes a whole file for those who may read, and run it if it is `executable`. A crash, a full disk or a
    power cut leaves the file that was there before, or the new one.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        with open_file(beside, "w") as stream:
            stream.write(text)
        _set(beside, folder_mode() if executable else file_mode())
        sync(beside)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def seal(path: Path) -> None:
    """Makes a file read-only for those who may read, unless it is a hard link to a file that may be the
    user's. A power cut leaves its content and its mode.
    """
    if path.stat().st_nlink == 1:
        _set(path, file_mode() & ~0o222)
    sync(path)


def _set(path: Path, mode: int) -> None:
    """Sets a mode, if it is for us to set: a container's user may own what it wrote."""
    if path.stat().st_uid == os.geteuid() or os.geteuid() == 0:
        path.chmod(mode)


def findings(home: Path) -> list[Finding]:
    """What others may read of `home`, but environments and kernels, which hold nothing of the user's."""
    found = []
    if (value := os.environ.get(SHARED, "")) not in ("", "0", "1"):
        found.append(
            warning(SHARED, repr(value), "1, for a group that may read, or nothing", f"Set {SHARED}=1.")
        )
    exposed = list(_exposed(home, 0o007 if shared() else 0o077))
    if exposed:
        files = "1 file" if len(exposed) == 1 else f"{len(exposed)} files"
        shown = ", ".join(str(path.relative_to(home)) for path in exposed[:3])
        found.append(
            warning(
                "home",
                f"{files} in {home} that others can read: {shown}{', ...' if len(exposed) > 3 else ''}",
                "files for you alone" + (" and your group" if shared() else ""),
                f"chmod -R {'o' if shared() else 'go'}-rwx {home}",
            )
        )
    return found


def _exposed(home: Path, others: int) -> Iterator[Path]:
    """Files in `home` that one of the mode bits `others` lets be read, in folders that it lets be entered."""
    public = (home / "envs", home / "kernels")
    waiting = [home] if home.is_dir() and home.stat().st_mode & others & 0o011 else []
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode) and mode & others & 0o011 and path not in public:
                waiting.append(path)
            elif stat.S_ISREG(mode) and mode & others & 0o044:
                yield path
