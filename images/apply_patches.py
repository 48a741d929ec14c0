"""Applies a folder's patch series to the installed packages of the Python that runs this.

    python apply_patches.py FOLDER [SERIES]

`FOLDER/SERIES` (default: series) lists patch files in order, one a line, `#` for comments; paths in a
patch count from site-packages. A patch that does not fit exactly, line for line where it says, is an
error: a library that has changed under a patch must be looked at again. Slim images and NGC's have no
`patch` program, and that one also takes what fits elsewhere.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@")


class Misfit(Exception):
    """Where a patch and a file disagree."""


def main(folder: Path, series: str = "series") -> int:
    listed = folder / series
    names = (
        [line.split("#")[0].strip() for line in listed.read_text().splitlines()] if listed.exists() else []
    )
    root = Path(sysconfig.get_paths()["purelib"])
    for name in filter(None, names):
        try:
            changed = patched((folder / name).read_text().splitlines(keepends=True), root)
        except (Misfit, OSError) as error:
            print(f"found: {name} does not apply to {root}: {error}")
            print(
                "expected: the library that it was made for; see the patch's entry in README.md, and drop or"
                " refresh it"
            )
            return 1
        for path, text in changed.items():
            path.write_text(text)
        print(f"applied {name}")
    return 0


def patched(patch: list[str], root: Path) -> dict[Path, str]:
    """File -> its text after a unified diff. Raises Misfit, and OSError for a file that is not there."""
    found: dict[Path, str] = {}
    path, old, new, taken = root, [], [], 0
    lines = iter(patch)
    for line in lines:
        if line.startswith("--- "):
            path = root / next(lines).split()[1].split("/", 1)[1]
            old, new, taken = path.read_text().splitlines(keepends=True), [], 0
        elif head := HUNK.match(line):
            first, count, made = int(head[1]) - 1, int(head[2] or 1), int(head[3] or 1)
            before, after = hunk(lines, count, made)
            if old[first : first + count] != before:
                raise Misfit(f"{path.name} has other lines than the patch from line {first + 1} on")
            new += old[taken:first] + after
            taken = first + count
            found[path] = "".join(new + old[taken:])
    return found


def hunk(lines: Iterator[str], count: int, made: int) -> tuple[list[str], list[str]]:
    """The next `count` lines as they were and `made` lines as they become. Raises Misfit if the patch ends
    before.
    """
    before, after = [], []
    while len(before) < count or len(after) < made:
        if (line := next(lines, None)) is None:
            raise Misfit(f"the patch ends after {len(before)} of a hunk's {count} lines")
        before += [line[1:]] if line[0] in " -" else []
        after += [line[1:]] if line[0] in " +" else []
    return before, after


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
