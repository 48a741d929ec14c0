"""Types of artifacts and the files of each: `stages/artifacts.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from forge.finding import Finding, Refused, error

FILE = "stages/artifacts.toml"

# Artifact type -> patterns of which each must match at least one file of an output.
Types = Mapping[str, tuple[str, ...]]


def load(stages: Path) -> Types:
    """The types of the repository whose `stages/` this is. Refused with every fault of the file."""
    path = stages / "artifacts.toml"
    if not path.is_file():
        raise Refused(
            error(FILE, "no such file", "the types of artifacts", "docs/formats.md says what it holds.")
        )
    try:
        types = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise Refused(error(FILE, str(fault), "TOML", "Mend that line.")) from fault
    if findings := [finding for name, files in types.items() for finding in _findings(name, files)]:
        raise Refused(findings)
    return {name: tuple(files) for name, files in types.items()}


def _findings(name: str, files: object) -> list[Finding]:
    if isinstance(files, list) and files and all(isinstance(pattern, str) and pattern for pattern in files):
        return []
    return [error(FILE, f"{name} = {files!r}", "a list of names or patterns of files, at least one")]
