"""A TOML file of this repository, or what is wrong with it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from forge.finding import Refused, error


def read(path: Path, name: str, expected: str) -> dict[str, Any]:
    """Its values. Refused, by `name`, if it is not there (what was `expected`) or is not TOML."""
    if not path.is_file():
        raise Refused(error(name, "no such file", expected, "docs/formats.md says what it holds."))
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise Refused(error(name, f"a fault of syntax: {fault}", "TOML", "Mend that line.")) from fault
