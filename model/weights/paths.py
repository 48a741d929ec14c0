"""Names and files that came from outside, such as those of a downloaded folder.

Whatever a stranger may have named (a shard in an index, a file of a repository, a link in a folder) becomes a
path through `member`, so no name reads or writes outside its folder. The rule for links: a link is followed
if it leads to a regular file in the same folder, or in the `blobs` of the hub's cache that the folder is part
of (`snapshots/<commit>/config.json -> ../../blobs/<digest>`). Every other link is refused, since it may lead
to a private file. FIFOs, sockets and devices are refused without opening them, because opening may wait for
ever.

This module needs the standard library only.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

JSON_BYTES = 100_000_000  # the largest JSON file that is read
NAME_BYTES = 1024  # of a name with its folders; a part of it may have 255, as file systems allow
PART_BYTES = 255
SHARD = ".safetensors"
TRUST = "trust.json"  # in a base whose code a server may run; stage base alone writes it
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link to nothing",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def printable(text: str) -> str:
    """`text` with escapes in place of all that cannot be printed, such as a terminal's control sequences."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class CheckpointError(ValueError):
    """A file that is not valid for a checkpoint: what was found, what was expected, what to do."""

    def __init__(
        self,
        found: str,
        expected: str = "a whole checkpoint",
        remedy: str = "Copy or download it again.",
    ):
        self.found, self.expected, self.remedy = printable(found), expected, remedy
        super().__init__(self.found)


def member(folder: Path, name: str) -> Path:
    """The path of the file `name` of `folder`: a regular file, or nothing yet.

    Raises CheckpointError if the name or a link leads out of the folder, or if it is something other than a
    regular file.
    """
    if fault := _name_fault(name):
        raise CheckpointError(
            f"the file name {_shown(name)} {fault}",
            f"the name of a file in {folder.name}",
            "Such a name is a mistake or an attack: get the files from their author again.",
        )
    path = folder / name
    if leads_out(folder, path):
        raise CheckpointError(
            f"{name} in {folder.name} is a link that leads out of the folder",
            "a file of the folder, or of the hub cache that it is part of",
            "If you trust the link, replace it by a copy of its file.",
        )
    try:
        kind = stat.S_IFMT(os.lstat(os.path.realpath(path)).st_mode)
    except OSError:  # nothing is there yet; a file that may not be read says so when it is opened
        if not path.is_symlink():
            return path
        kind = stat.S_IFLNK
    if kind != stat.S_IFREG:
        raise CheckpointError(
            f"{name} in {folder.name} is {_KINDS.get(kind, 'no file')}",
            "a regular file",
            "Remove it, or copy the folder again.",
        )
    return path


def leads_out(folder: Path, path: Path) -> bool:
    """Whether a link on the way to `path` leads out of `folder` and of the hub's cache that it is part of."""
    real = Path(os.path.realpath(path))
    return not any(real.is_relative_to(place) for place in _places(folder))


def shard(folder: Path, name: str) -> Path:
    """`member` for the name of a shard in an index, which lies in the folder itself and ends in
    `.safetensors`. So writing a shard never replaces another file.
    """
    if not _name_fault(name) and ("/" in name or not name.endswith(SHARD)):
        raise CheckpointError(
            f"the index names {_shown(name)} as a shard",
            f"a file of its own folder that ends in {SHARD}",
            "Use the safetensors files that belong to this index.",
        )
    return member(folder, name)


def members(folder: Path, below: str = "") -> Iterator[Path]:
    """Every file of `folder` (or of its subfolder `below`), sorted by name. Hidden files and folders are
    left out.

    Raises CheckpointError for anything else than a file that `member` allows, and for a link to a folder.
    """
    for entry in sorted((folder / below).iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from members(folder, f"{below}{entry.name}/")
        else:
            yield member(folder, f"{below}{entry.name}")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of at most JSON_BYTES. Raises CheckpointError, with the file's name, on anything else."""
    try:
        if (size := member(file.parent, file.name).stat().st_size) > JSON_BYTES:
            raise CheckpointError(f"{file.name} has {size} bytes", f"at most {JSON_BYTES} bytes of JSON")
        value = parse_object(file.read_bytes())
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} cannot be read as JSON: {error}", "a JSON object") from error
    return value


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises ValueError on anything else, on text that is nested too deeply, and on a
    repeated key, of which readers may take either value.
    """
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {_shown(key)} stands twice in one object")
            seen.add(key)
    return mapping


def _name_fault(name: str) -> str:
    """Why `name` is not that of a file in a folder; "" if it is."""
    if not name.isprintable():
        return "has a control character"
    if "\\" in name:
        return "has a backslash"
    if name.startswith("/"):
        return "is an absolute path"
    parts = name.split("/")
    if ".." in parts:
        return "leads out of its folder"
    if "" in parts or "." in parts:
        return "has an empty part"
    if len(name.encode()) > NAME_BYTES or any(len(part.encode()) > PART_BYTES for part in parts):
        return "is too long"
    return ""


def _places(folder: Path) -> Iterator[Path]:
    """Where the files of a folder may lie: in it, or in the blobs of the hub's cache around it."""
    root = Path(os.path.realpath(folder))
    yield root
    for parent in root.parents:
        if parent.name == "snapshots":
            yield Path(os.path.realpath(parent.with_name("blobs")))


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 80 else name[:77] + "...")
