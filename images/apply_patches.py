"""Applies a folder's patch series to the installed packages of the Python that runs this.

    python apply_patches.py FOLDER

`FOLDER/series` lists patch files in order, one a line, `#` for comments; paths in a patch count from site-packages.
A patch that does not fit exactly is an error: a library that has changed under a patch must be looked at again.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path


def main(folder: Path) -> int:
    series = folder / "series"
    names = [line.split("#")[0].strip() for line in series.read_text().splitlines()] if series.exists() else []
    root = sysconfig.get_paths()["purelib"]
    for name in filter(None, names):
        command = ["patch", "--strip=1", "--fuzz=0", "--forward", "--batch", f"--directory={root}", f"--input={(folder / name).resolve()}"]
        done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
        if done.returncode or "(offset " in done.stdout:  # --fuzz=0 still takes a hunk that fits some lines further on
            print(f"found: {name} does not apply to {root}\n{done.stdout}{done.stderr}")
            print("expected: the library that it was made for; see the patch's entry in README.md, and drop or refresh it")
            return 1
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print(f"applied {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
