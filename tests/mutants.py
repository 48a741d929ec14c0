"""Breaks the most critical lines one by one, in a copy, and sees that a test notices each.

    .venv/bin/python tests/mutants.py [WORD ...]

The table stands in tests/mutants.toml. With WORDs only those entries run whose file or sentence has one of
them. Exit status 1 if a test passes on broken code, fails on code that is not broken, or if an entry's line
is no longer in its file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from run import REPO, ROOMS, interpreter

TABLE = REPO / "tests" / "mutants.toml"
LIMIT = 900  # seconds for one test; broken code may wait for ever
FAILED = 1  # pytest's exit status for tests that failed; others say that none ran


@dataclass(frozen=True)
class Mutant:
    """`old` of `file` becomes `new`, so that what `breaks` says is true. `test` is the file with the nearest
    test, and `keyword` what pytest chooses it by.
    """

    breaks: str
    file: str
    old: str
    new: str
    test: str
    keyword: str

    def place(self, folder: Path) -> str:
        """What is wrong with the entry ("" if nothing): its snippet has to be there once."""
        path = folder / self.file
        count = path.read_text().count(self.old) if path.is_file() else 0
        return "" if count == 1 else f"its line is there {count} times in {self.file}; expected once"


def load() -> list[Mutant]:
    return [Mutant(**entry) for entry in tomllib.loads(TABLE.read_text())["mutants"]]


def copied(folder: Path) -> None:
    """The working tree as git sees it, changes and new files included, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        check=True,
    )
    for name in os.fsdecode(listed.stdout).split("\0"):
        if name and (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, folder / name)


def environment_of(test: str) -> str:
    return next(
        environment for _, environment, rooms in ROOMS for room in rooms if Path(test).is_relative_to(room)
    )


def status_of(folder: Path, test: str, keyword: str) -> int | None:
    """pytest's exit status for some tests of the copy; None if they do not end."""
    command, variables = interpreter(environment_of(test))
    variables = {name: value.replace(str(REPO), str(folder), 1) for name, value in variables.items()}
    pytest = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test, "-k", keyword]
    process = subprocess.Popen(
        [*command, *pytest],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def unbroken_faults(folder: Path, mutants: list[Mutant]) -> list[str]:
    """Tests that fail although nothing is broken: they would notice everything."""
    keywords: dict[str, set[str]] = {}
    for mutant in mutants:
        keywords.setdefault(mutant.test, set()).add(mutant.keyword)
    faults = []
    for number, (test, words) in enumerate(keywords.items(), 1):
        began = time.monotonic()
        status = status_of(folder, test, " or ".join(f"({word})" for word in sorted(words)))
        verdict = "passes" if status == 0 else f"FAILS (pytest's status {status})"
        _row(number, len(keywords), began, verdict, f"{test}, nothing broken")
        if status != 0:
            faults.append(f"{test} fails with nothing broken (pytest's status {status})")
    return faults


def survival(folder: Path, mutant: Mutant) -> str:
    """Why a mutant counts as not noticed, "" if a test fails on it."""
    if stale := mutant.place(folder):
        return stale
    path = folder / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        status = status_of(folder, mutant.test, mutant.keyword)
    finally:
        path.write_text(text)
    if status in (FAILED, None):
        return ""
    why = "passes" if status == 0 else f"did not run (pytest's status {status})"
    return f"{mutant.test} -k '{mutant.keyword}' {why}"


def _row(number: int, total: int, began: float, verdict: str, what: str) -> None:
    print(f"{number:3d}/{total}  {time.monotonic() - began:6.1f} s  {verdict:8}  {what}", flush=True)


def main() -> int:
    words = sys.argv[1:]
    chosen = [m for m in load() if not words or any(word in f"{m.file} {m.breaks}" for word in words)]
    if not chosen:
        print(f"mutants: found none with {' or '.join(words)}; expected words of {TABLE.name}")
        return 1
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        folder = Path(place).resolve()
        copied(folder)
        faults = unbroken_faults(folder, chosen)
        for number, mutant in enumerate(chosen, 1):
            began = time.monotonic()
            if why := survival(folder, mutant):
                faults.append(f"{mutant.file}: {mutant.breaks}: {why}")
            _row(
                number,
                len(chosen),
                began,
                "SURVIVED" if why else "noticed",
                f"{mutant.file}: {mutant.breaks}",
            )
    for fault in faults:
        print(f"fault: {fault}")
    print(f"{len(chosen)} mutants, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
