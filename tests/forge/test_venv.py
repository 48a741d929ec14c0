"""The host side's environment: which Python makes it, and when it is made anew."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forge import venv

REPO = Path(__file__).resolve().parents[2]
THIS = "{}.{}".format(*sys.version_info)


@pytest.fixture
def clone(tmp_path):
    """A clone whose host.lock holds nothing, with a whole .venv of this Python."""
    repo = tmp_path / "clone"
    (repo / "forge").mkdir(parents=True)
    shutil.copy(REPO / "Makefile", repo)
    shutil.copy(REPO / "forge/venv.py", repo / "forge")
    (repo / "host.lock").touch()
    (repo / ".venv/bin").mkdir(parents=True)
    (repo / ".venv/bin/python").symlink_to(sys.executable)
    (repo / ".venv/.ready").write_text(venv.stamp(str(repo / ".venv"), str(repo / "host.lock")))
    (repo / ".venv/old").touch()
    return repo


def stays(repo: Path, this_python: bool = False, version: tuple[int, int] = (3, 9)) -> bool:
    """Whether `.venv` stays as it is. The Python that would make another is one that is refused, so that
    none is made.
    """
    code = venv.main(str(repo), this_python, version)
    assert (repo / ".venv/old").exists()
    return code == 0


@pytest.mark.parametrize("version", [(3, 6), (3, 10), (3, 15)])
def test_a_python_that_is_too_old_or_too_new_is_refused_before_anything_is_made(tmp_path, capsys, version):
    (tmp_path / "host.lock").touch()
    assert venv.main(str(tmp_path), False, version) == 1
    said = capsys.readouterr().err
    assert (
        f"found Python {version[0]}.{version[1]}" in said
        and "expected Python 3.11 to 3.14" in said
        and "make demo PYTHON=" in said
    )
    assert not (tmp_path / ".venv").exists()


def test_a_whole_environment_stays_whichever_python_starts_make(clone):
    """`make demo PYTHON=python3.12` once, then `make chat` on a machine whose python3 is too old."""
    assert stays(clone)


def test_a_python_that_is_named_must_be_the_one_of_the_environment(clone):
    assert stays(clone, this_python=True, version=sys.version_info[:2])
    assert not stays(clone, this_python=True)


def test_an_environment_of_an_older_lock_does_not_stay(clone):
    (clone / "host.lock").write_text("# newer\n")
    assert not stays(clone)


def test_an_environment_whose_python_is_gone_or_was_replaced_does_not_stay(clone):
    ready = clone / ".venv/.ready"
    # an upgrade of the system's python3
    ready.write_text(ready.read_text().replace(f"python {THIS}", "python 3.10"))
    assert not stays(clone)
    (clone / ".venv/bin/python").unlink()
    assert not stays(clone)


def test_an_environment_of_a_moved_clone_or_of_an_older_make_does_not_stay(clone):
    moved = clone.rename(clone.parent / "moved")
    assert not stays(moved)
    (moved / ".venv/.ready").write_text("")
    assert not stays(moved)


def test_make_makes_a_moved_environment_anew(clone):
    moved = clone.rename(clone.parent / "moved")
    done = subprocess.run(
        ["make", ".venv/.ready", f"PYTHON={sys.executable}"], cwd=moved, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"making .venv with Python {THIS}" in done.stdout and not (moved / ".venv/old").exists()
    ready = (moved / ".venv/.ready").stat().st_mtime_ns
    again = subprocess.run(["make", ".venv/.ready"], cwd=moved, capture_output=True, text=True)
    assert (
        again.returncode == 0
        and "making" not in again.stdout
        and (moved / ".venv/.ready").stat().st_mtime_ns == ready
    )


@pytest.mark.parametrize(
    "words, variables, expected",
    [
        ([], {}, "forge/venv.py"),
        (["PYTHON=python9"], {}, "forge/venv.py --this-python"),
        ([], {"PYTHON": "python9"}, "forge/venv.py --this-python"),
    ],
)
def test_only_a_python_that_the_user_named_makes_an_environment_anew(clone, words, variables, expected):
    programs = clone / "programs"
    programs.mkdir()
    for name in ("python3", "python9"):
        (programs / name).write_text('#!/bin/sh\necho "$0 $@"\n')
        (programs / name).chmod(0o755)
    # of a `make test`
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")
    }
    environment |= {"PATH": f"{programs}:{environment['PATH']}", **variables}
    done = subprocess.run(
        ["make", ".venv/.ready", *words], cwd=clone, capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip().endswith(
        f"{programs}/{'python9' if words or variables else 'python3'} {expected}"
    )


def test_a_python_that_is_not_there_is_named(clone):
    done = subprocess.run(
        ["make", ".venv/.ready", "PYTHON=python9"], cwd=clone, capture_output=True, text=True
    )
    assert (
        done.returncode
        and "found no python9; expected Python 3.11 to 3.14" in done.stderr
        and (clone / ".venv/old").exists()
    )
