"""manifest.json of an artifact: what it must hold, and what follows from what in it."""

from __future__ import annotations

import datetime
import json
import os
import re
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from forge import hashing, sources
from forge.finding import Refused, error

MANIFEST = "manifest.json"
Manifest = dict[str, Any]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEXTS = ("stage", "key", "type", "digest", "created", "recipe", "executor")


def read(folder: Path) -> Manifest | None:
    """The manifest of the artifact in `folder`; None if none lies there.

    Refused if it is not what forge wrote: torn, of another shape, or contradicting itself or its place.
    """
    path = folder / MANIFEST
    try:
        # A FIFO or a device would not end, and a link may lead anywhere.
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ValueError("no plain file")
        manifest = json.loads(path.read_bytes())
        if fault := _shape(manifest) or _contradiction(manifest, folder):
            raise ValueError(fault)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as fault:
        raise Refused(
            error(
                str(path),
                f"a manifest that is damaged or was edited: {fault}",
                "the manifest as it was accepted",
                f"Put it back from a copy, or delete the folder {folder}: the stage runs again.",
            )
        ) from fault
    return dict(manifest)


def plain_name(name: str) -> bool:
    """Whether a file name stays in its folder and can be shown: relative, no `..`, no control character."""
    path = PurePosixPath(name)
    return (
        str(path) == name
        and not path.is_absolute()
        and path.parts != ()
        and ".." not in path.parts
        and name.isprintable()
    )


def _shape(manifest: Any) -> str:
    """The first field of another type than forge writes ("" if none)."""
    if not isinstance(manifest, dict):
        return "no object"
    for name in _TEXTS:
        if not isinstance(manifest.get(name), str):
            return f"{name} = {_shown(manifest.get(name))}, which is no text"
    seconds: Any = manifest.get("seconds")
    if type(seconds) not in (int, float) or not 0 <= seconds < 1e12:  # nor NaN, which is in no range
        return f"seconds = {_shown(seconds)}"
    try:
        has_zone = datetime.datetime.fromisoformat(manifest["created"]).tzinfo is not None
    except ValueError:
        has_zone = False
    if not has_zone:
        return f"created = {_shown(manifest['created'])}, which is no time with its zone"
    components = manifest.get("components")
    if not isinstance(components, dict) or not all(isinstance(value, str) for value in components.values()):
        return "components that are no map of texts"
    files = manifest.get("files")
    if not isinstance(files, dict):
        return "files that are no map"
    if fault := sources.fault(manifest.get("sources", {})):  # older manifests have none
        return fault
    return next((fault for name, entry in files.items() if (fault := _entry(name, entry))), "")


def _entry(name: str, entry: Any) -> str:
    if not plain_name(name) or name == MANIFEST:
        return f"the file name {_shown(name)}"
    size, sha256 = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or size < 0:
        return f"size = {_shown(size)} of {name}"
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        return f"sha256 = {_shown(sha256)} of {name}"
    return ""


def _contradiction(manifest: Manifest, folder: Path) -> str:
    """What in a manifest does not follow from the rest of it, or from its folder ("" if all does)."""
    entries = ((name, entry["sha256"]) for name, entry in manifest["files"].items())
    if manifest["digest"] != (digest := hashing.of_entries(entries)):
        return f"digest {_shown(manifest['digest'])}, where its files give {digest}"
    if manifest["key"] != (key := hashing.of_value(manifest["components"])):
        return f"key {_shown(manifest['key'])}, where its components give {key}"
    if (manifest["stage"], manifest["key"]) != (folder.parent.name, folder.name):
        return f"{_shown(manifest['stage'])}/{manifest['key']}, which is not its folder"
    return ""


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
