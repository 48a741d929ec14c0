"""Finds the files of conversations in the sources: which are read, which are a held-out split, and which are
left out and why.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from model.weights.paths import leads_out
from stages.conversations import content
from stages.job import StageError

# In any letter case. All but the last may also end in .gz.
ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet")
PACKED = ".gz"
HELD_OUT = {
    "test",
    "testing",
    "validation",
    "valid",
    "val",
    "eval",
    "evaluation",
    "heldout",
    "held_out",
    "held-out",
    "holdout",
}
# A split only if there is a file called train too. Alone, "dev" may be the topic of the conversations.
WITH_TRAIN = {"dev"}
TRAIN = ("train", "training")
COPY = re.compile(r"(?:^copy of | - copy(?: ?\(\d+\))?$| copy(?: \d+)?$| ?\(\d+\)$)", re.IGNORECASE)
EDITORS = re.compile(r"~$|^#.*#$|\.(?:swp|swo|bak|orig|rej|tmp|part|crdownload)$", re.IGNORECASE)
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "$recycle.bin"}


@dataclass(frozen=True)
class File:
    """A file to read. `name` begins with its source, such as `conversations/direct_action.jsonl`. `split` is
    the name of the held-out split that it is, or "".

    `in_folder`: the recipe names its folder, not the file itself.
    """

    name: str
    path: Path
    kind: content.Kind
    split: str = ""
    in_folder: bool = False

    @property
    def stem(self) -> str:
        """The category of rows that name none."""
        return SHARD.sub("", stem(_path_text(Path(self.path.name))))


@dataclass
class Listing:
    """The files to read, in the order of the sources, and the files left out: name -> reason."""

    files: list[File] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def list_files(sources: list[Path]) -> Listing:
    """The files of all sources. A file that the recipe names is always read; for files in a folder the name
    decides.

    Raises StageError if a file is of a foreign kind or torn, if a folder has no file to read, or if all files
    are held out.
    """
    listing = Listing()
    names: set[str] = set()
    for number, source in enumerate(sources, 1):
        files = _folder_files(source, listing) if source.is_dir() else [(source, "")]
        for path, split in files:
            name = _path_text(path.relative_to(source.parent))
            name = f"{name} (source {number})" if name in names else name
            names.add(name)
            try:
                kind = content.recognise(path)
            except content.Foreign as foreign:
                raise StageError(
                    f"{name} is {foreign.kind}",
                    "conversations as JSON Lines, JSON or Parquet",
                    foreign.remedy,
                ) from foreign
            if kind.name == content.EMPTY:
                listing.left_out[name] = "is empty"
            else:
                listing.files.append(File(name, path, kind, split, source.is_dir()))
    if listing.files and all(file.split for file in listing.files):
        raise StageError(
            f"nothing but held-out splits: {joined_names(file.name for file in listing.files)}",
            "files to train on",
            "To train on one of them, name the file itself in `sources.conversations`, not its folder.",
        )
    return listing


def joined_names(names: Iterable[str], limit: int = 20) -> str:
    """Names in one line; only the first `limit` of them, and the number of the others."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def stem(name: str) -> str:
    """A file's name without the ending that says how to read it."""
    lower = name.lower().removesuffix(PACKED)
    ending = next((e for e in ENDINGS if lower.endswith(e)), "")
    return name[: len(lower) - len(ending)] if ending else Path(name).stem


def _folder_files(source: Path, listing: Listing) -> list[tuple[Path, str]]:
    """The files of a folder to read, sorted by name, each with its held-out split. Adds the other files to
    `listing`.
    """
    chosen: list[Path] = []
    for folder, folders, files in os.walk(source, onerror=_refuse_unreadable):
        directory = Path(folder)
        folders.sort()
        for name in list(folders):
            reason = (
                "is hidden"
                if name.startswith(".")
                else (
                    "holds a system's own files"
                    if name.lower() in SYSTEM
                    else "is a link to a folder, which is not followed"
                    if (directory / name).is_symlink()
                    else ""
                )
            )
            if reason:
                folders.remove(name)
                listing.left_out[f"{_path_text((directory / name).relative_to(source.parent))}/"] = reason
        for name in sorted(files):
            if reason := _reason_left_out(source, directory / name, files):
                listing.left_out[_path_text((directory / name).relative_to(source.parent))] = reason
            else:
                chosen.append(directory / name)
    chosen.sort()
    if not chosen:
        left_out = (
            f"; there are {joined_names(f'{name} ({reason})' for name, reason in listing.left_out.items())}"
            if listing.left_out
            else ""
        )
        raise StageError(
            f"no file of conversations in {source.name}{left_out}",
            f"files that end in {', '.join(ENDINGS)} (or .gz) in every folder of the sources",
            "Check `sources.conversations` in the recipe.",
        )
    relatives = [PurePosixPath(path.relative_to(source).as_posix()) for path in chosen]
    places = {_name_key(relative) for relative in relatives}
    return [
        (path, _held_out_split(relative, places)) for path, relative in zip(chosen, relatives, strict=False)
    ]


def _path_text(path: Path) -> str:
    """A path as text. Bytes of a name that are not UTF-8 are replaced by marks."""
    return os.fsencode(path).decode("utf-8", "replace")


def _refuse_unreadable(error: OSError) -> None:
    raise StageError(
        f"the folder {Path(error.filename).name} cannot be read: {error.strerror}",
        "one that this user may read",
        "Change its permissions.",
    )


def _reason_left_out(source: Path, path: Path, names: list[str]) -> str:
    """Why a file below `source` is not read; "" if it is read. `names` are the files of its folder."""
    name = path.name
    if name.startswith("."):
        return "is hidden"
    if EDITORS.search(name):
        return "is an editor's or a download's own copy"
    if name.lower() in SYSTEM:
        return "is a system's own file"
    if not path.exists():
        return "is a link to nothing"
    if not path.is_file():
        return "is no file"
    if leads_out(source, path):
        return "is a link out of the folder, which is not followed"
    if not name.lower().removesuffix(PACKED).endswith(ENDINGS):
        try:
            kind = content.recognise(path)
        except content.Foreign as foreign:
            return f"is {foreign.kind}"
        except StageError as error:
            return error.found.removeprefix(f"{name} ")
        if kind.name in (content.EMPTY, content.TEXT):
            return "is empty" if kind.name == content.EMPTY else "is text"
        return f"holds {kind.name} by its content: end its name in .jsonl or .parquet to have it read"
    plain = COPY.sub("", stem(name))
    if plain != stem(name) and any(plain == stem(other_name) for other_name in names):
        return f"is a copy of {plain}"
    return ""


def _name_parts(relative: PurePosixPath) -> list[str]:
    """The folders and the stem of a file, in lower case and without a shard's number."""
    return [*(part.lower() for part in relative.parts[:-1]), SHARD.sub("", stem(relative.name)).lower()]


def _name_key(relative: PurePosixPath) -> tuple[str, ...]:
    return tuple(_name_parts(relative))


def _held_out_split(relative: PurePosixPath, places: set[tuple[str, ...]]) -> str:
    """The held-out split that a file of a folder belongs to; "" if it is trained on.

    A folder or stem that equals the split's name belongs to it. If the split's name is only a part of a
    longer name (`chats_test`), there must be a twin to train on (`chats_train`), because `eye_test.jsonl` may
    be about eyes.
    """
    words = _name_parts(relative)
    for position, word in enumerate(words):
        if word in HELD_OUT:
            return word
        parts = re.split(r"([-_. ])", word)
        for index, part in enumerate(parts):
            if part in HELD_OUT | WITH_TRAIN:
                for train in TRAIN:
                    twin = "".join([*parts[:index], train, *parts[index + 1 :]])
                    beside = (*words[:position], twin)
                    if any(place[: position + 1] == beside for place in places):
                        return part
    return ""
