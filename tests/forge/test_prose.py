"""Prose is read in diffs and terminals: no line of it is wider than code may be. Tables and code are as wide
as what stands in them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
COLUMNS = 110
LISTED = subprocess.run(
    ["git", "ls-files", "*.md", "NOTICE", ":!tests/golden"], cwd=REPO, capture_output=True, text=True
)


@pytest.mark.parametrize("name", LISTED.stdout.split())
def test_no_line_of_prose_is_too_wide(name):
    fenced, wide = False, []
    for number, line in enumerate((REPO / name).read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        is_code = fenced or line.startswith("    ")
        if len(line) > COLUMNS and not is_code and not line.startswith("|"):
            wide.append(f"{name}:{number}")
    assert not wide
