"""These tests run in the environment train, which `tests/run.py` takes; elsewhere they are left out."""

from __future__ import annotations

from importlib.util import find_spec

MISSING = [name for name in ("torch", "transformers", "peft") if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header() -> list[str]:
    left_out = f"tests/bench: left out; they need the environment train, which has {', '.join(MISSING)}"
    return [left_out] if MISSING else []
