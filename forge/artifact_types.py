"""Types of artifacts and the files of each: `stages/artifacts.toml`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from forge import toml_file
from forge.finding import Finding, Refused, error

FILE = "stages/artifacts.toml"

# Artifact type -> patterns of which each must match at least one file of an output.
Types = Mapping[str, tuple[str, ...]]


def load(stages: Path) -> Types:
    """The types of the repository whose `stages/` this is. Refused with every fault of the file."""
    types = toml_file.read(stages / "artifacts.toml", FILE, "the types of artifacts")
    if findings := [finding for name, files in types.items() for finding in _findings(name, files)]:
        raise Refused(findings)
    return {name: tuple(files) for name, files in types.items()}


def _findings(name: str, files: object) -> list[Finding]:
    if isinstance(files, list) and files and all(isinstance(pattern, str) and pattern for pattern in files):
        return []
    return [error(FILE, f"{name} = {files!r}", "a list of names or patterns of files, at least one")]
