"""Applies a folder's patch series to the installed packages of the Python that runs this.

    python apply_patches.py FOLDER [SERIES]

`FOLDER/SERIES` (default: series) lists patch files in order, one a line, `#` for comments; paths in a patch count from
site-packages. A patch that does not fit exactly, line for line where it says, is an error: a library that has changed under a
patch must be looked at again. Slim images and NGC's have no `patch` program, and that one also takes what fits elsewhere.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from pathlib import Path


class Misfit(Exception):
    """Where a patch and a file disagree."""


def main(folder: Path, series: str = "series") -> int:
    listed = folder / series
    names = [line.split("#")[0].strip() for line in listed.read_text().splitlines()] if listed.exists() else []
    roots = sysconfig.get_paths()["purelib"]
    for name in filter(None, names):
        try:
            changed = patched((folder / name).read_text().splitlines(keepends=True), Path(roots))
        except (Misfit, OSError) as error:
            print(f"found: {name} does not apply to {roots}: {error}")
            print("expected: the library that it was made for; see the patch's entry in README.md, and drop or refresh it")
            return 1
        for path, text in changed.items():
            path.write_text(text)
        print(f"applied {name}")
    return 0


def patched(patch: list[str], root: Path) -> dict[Path, str]:
    """File -> its text after a unified diff. Raises Misfit, and OSError for a file that is not there."""
    found: dict[Path, str] = {}
    at = 0
    while at < len(patch):
        if not patch[at].startswith("--- "):
            at += 1
            continue
        path = root / patch[at + 1].split()[1].split("/", 1)[1]
        old, new, taken = path.read_text().splitlines(keepends=True), [], 0
        at += 2
        while at < len(patch) and (head := re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@", patch[at])):
            first, count = int(head[1]) - 1, int(head[2] or 1)
            new += old[taken:first]
            taken, end = first, first + count
            at += 1
            while at < len(patch) and patch[at][0] in " -+\\":
                sign, line = patch[at][0], patch[at][1:]
                at += 1
                if sign == "+":
                    new.append(line)
                elif sign in " -":
                    if taken >= len(old) or old[taken] != line:
                        raise Misfit(f"{path.name} line {taken + 1} is {old[taken].rstrip() if taken < len(old) else 'past the end'!r}, the patch wants {line.rstrip()!r}")
                    new += [line] if sign == " " else []
                    taken += 1
                if taken == end and (at == len(patch) or patch[at][0] not in "+\\"):
                    break
            if taken != end:
                raise Misfit(f"{path.name}: a hunk of {count} lines ends after {taken - first}")
        found[path] = "".join(new + old[taken:])
    return found


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
