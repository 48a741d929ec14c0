"""docs/traps.md and the tests name the same traps."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ENTRIES = re.split(r"^### ", (TESTS.parent / "docs/traps.md").read_text(), flags=re.MULTILINE)[1:]
# Name of a trap -> its entry's text.
TRAPS = {entry.split("\n", 1)[0]: entry for entry in ENTRIES}


def marked() -> dict[str, list[tuple[str, str]]]:
    """Name of a trap -> (file, test) of every test that is marked with it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.trap":
                    place = (str(path.relative_to(TESTS.parent)), node.name)
                    for name in mark.args:
                        found.setdefault(ast.literal_eval(name), []).append(place)
    return found


def test_every_trap_has_a_test_and_every_mark_a_trap():
    assert set(marked()) == set(TRAPS)


def test_an_entry_lists_the_tests_that_meet_it():
    for name, places in marked().items():
        listed = re.findall(r"`(test_\w+)", TRAPS[name])
        assert {test for _, test in places} == set(listed), name
        assert {file for file, _ in places} == set(re.findall(r"`(tests/[\w/]+\.py)", TRAPS[name])), name
