"""Leaves out the tests of a room whose environment this is not, and says so; `tests/run.py` takes each.

With --trap NAME only the tests run that meet this entry of docs/traps.md.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
# Room -> the environment that its tests run in, and what shows that this is it.
ROOMS = {
    "model": ("train", ("torch", "transformers")),
    "stages": ("train", ("torch", "transformers", "peft", "trl")),
    "bench": ("train", ("torch", "transformers", "peft")),
    "vllm": ("vllm", ("vllm",)),
}
MISSING = {
    room: missing
    for room, (_, needed) in ROOMS.items()
    if (missing := [name for name in needed if find_spec(name) is None])
}
collect_ignore_glob = [f"{room}/test_*.py" for room in MISSING]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--trap", metavar="NAME", help="only the tests of this entry of docs/traps.md")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if trap := config.getoption("--trap"):
        meets = {item: any(trap in mark.args for mark in item.iter_markers("trap")) for item in items}
        config.hook.pytest_deselected(items=[item for item in items if not meets[item]])
        items[:] = [item for item in items if meets[item]]


def pytest_report_header(config: pytest.Config) -> list[str]:
    asked = [Path(words.split("::")[0]).resolve() for words in config.args]
    return [
        f"tests/{room} is left out: it needs the environment {ROOMS[room][0]}, which has {', '.join(missing)}"
        for room, missing in MISSING.items()
        if any(its.is_relative_to(TESTS / room) or (TESTS / room).is_relative_to(its) for its in asked)
    ]
