"""Entries of tests/mutants.toml name lines that are there, once, and tests that are there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests"))
import mutants  # noqa: E402

MUTANTS = mutants.load()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.breaks)
def test_an_entry_names_one_line_and_its_test(mutant):
    assert mutant.place(REPO) == ""
    names = (REPO / mutant.test).read_text()
    assert all(word in names for word in mutant.keyword.split(" or "))
    assert mutant.old != mutant.new


@pytest.fixture
def clone(tmp_path):
    """A folder with a line and two tests, of which one asks about the line."""
    (tmp_path / "tests/forge").mkdir(parents=True)
    (tmp_path / "doubling.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "tests/forge/test_doubling.py").write_text(
        "import sys; sys.path.insert(0, '.')\nimport doubling\n"
        "def test_two(): assert doubling.double(1) == 2\n"
        "def test_none(): assert doubling.double(0) == 0\n"
    )
    return tmp_path


def test_what_no_test_notices_what_did_not_run_and_what_is_not_there_is_said(clone):
    noticed = mutants.Mutant("two", "doubling.py", "2 * x", "3 * x", "tests/forge/test_doubling.py", "two")
    said = lambda **other: mutants.survival(clone, replace(noticed, **other))
    assert said() == ""
    assert "passes" in said(keyword="none")
    assert "did not run (pytest's status 5)" in said(keyword="three")
    assert "did not run" in said(new="2 *")
    assert "is there 0 times in doubling.py" in said(old="4 * x")
    assert (clone / "doubling.py").read_text() == "def double(x):\n    return 2 * x\n"
    assert mutants.unbroken_faults(clone, [noticed]) == []
    (clone / "doubling.py").write_text("def double(x):\n    return 3 * x\n")
    assert "fails with nothing broken" in mutants.unbroken_faults(clone, [noticed])[0]


def test_a_word_that_no_entry_has_is_named():
    done = subprocess.run(
        [sys.executable, str(REPO / "tests/mutants.py"), "no-such-word"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "found none with no-such-word" in done.stdout
