"""Prose is read in diffs and terminals: no line of it is wider than code may be. Tables and code are as wide
as what stands in them.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
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


VERB = re.compile(
    r"\b(is|are|was|were|has|have|had|did|does|cannot|may|comes|names|answers|trains)\b|^found\b"
)


def text(node: ast.expr) -> str:
    """The words of a string, `_` for each value in it; "" for what is none."""
    match node:
        case ast.Constant(str() as words):
            return words
        case ast.JoinedStr(parts):
            return "".join(text(part) if isinstance(part, ast.Constant) else "_" for part in parts)
        case ast.BinOp():
            return text(node.left) + text(node.right)
    return ""


def findings(path: Path) -> Iterator[str]:
    """What the findings of a module say was found, as far as it stands there."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(ast.Name("error" | "warning"), [_, found, *_]):
                yield text(found)
            case ast.Call(ast.Attribute(_, "fault"), [_, found, *_]):
                yield text(found)
            case ast.Assign([ast.Name("found")], value):
                yield text(value)


def test_what_was_found_is_a_thing_and_no_sentence():
    """A finding is shown as `found THING; expected THING`."""
    files = [REPO / "build.py", *(REPO / "forge").rglob("*.py"), *(REPO / "product").rglob("*.py")]
    said = [found for path in files for found in findings(path)]
    heads = [re.split(r"[(,:;]|\b(?:that|which|who|why)\b", found)[0] for found in said]
    assert len(heads) > 100 and [head for head in heads if VERB.search(head)] == []
