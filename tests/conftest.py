"""Leaves out the tests of a room whose environment this is not, and says so; `tests/run.py` takes each."""

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


def pytest_report_header(config: pytest.Config) -> list[str]:
    asked = [Path(words.split("::")[0]).resolve() for words in config.args]
    return [
        f"tests/{room} is left out: it needs the environment {ROOMS[room][0]}, which has {', '.join(missing)}"
        for room, missing in MISSING.items()
        if any(its.is_relative_to(TESTS / room) or (TESTS / room).is_relative_to(its) for its in asked)
    ]
