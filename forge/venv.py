"""Makes `.venv`, the host side's environment, and makes it anew where it is of another Python, another
place or an older host.lock.

    python3 forge/venv.py [--this-python]

make starts this before everything else. It needs no package, and any Python from 3.6 on can read it, so
that one that is too old is told so. A whole `.venv` stays whichever Python starts this; with
`--this-python` only one of the same version stays.
"""

import hashlib
import os
import shutil
import subprocess
import sys

OLDEST, NEWEST = (3, 11), (3, 14)


def main(repo: str, this_python: bool, version: "tuple[int, int]" = sys.version_info[:2]) -> int:
    """Exit status. `version` is (major, minor) of the Python that would make the environment."""
    folder = os.path.join(repo, ".venv")
    said = stamp(folder, os.path.join(repo, "host.lock"))
    if (
        said
        and read(os.path.join(folder, ".ready")) == said
        and not (this_python and "python {}.{}\n".format(*version) not in said)
    ):
        return 0
    if not OLDEST <= version <= NEWEST:
        return refuse(
            f"found Python {version[0]}.{version[1]} ({sys.executable})",
            "expected Python 3.11 to 3.14",
            "Name one of these, for example: make demo PYTHON=python3.12",
        )
    try:
        import ensurepip  # noqa: F401  Debian and Ubuntu leave it out of python3
    except ImportError:
        return refuse(
            f"found {sys.executable} without ensurepip",
            "expected a Python that can make virtual environments",
            "On Debian and Ubuntu: sudo apt install python{}.{}-venv".format(*version),
        )
    # An activated .venv puts its own python3 first: what is about to be deleted cannot make what replaces it.
    base = getattr(sys, "_base_executable", None) or sys.executable
    print("making .venv with Python {}.{}".format(*version), flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    python = os.path.join(folder, "bin", "python")
    for command in (
        [base, "-m", "venv", folder],
        [python, "-m", "pip", "install", "-qq", "--require-hashes", "-r", os.path.join(repo, "host.lock")],
    ):
        if subprocess.call(command):
            return refuse(
                "{} failed".format(" ".join(command[1:4])),
                "expected exit status 0",
                "Its lines above say why. Most often it is the network or the disk; run make again",
            )
    # Last, so that a half-made environment is never taken for whole.
    with open(os.path.join(folder, ".ready"), "w") as ready:
        ready.write(stamp(folder, os.path.join(repo, "host.lock")) or "")
    return 0


def stamp(folder: str, lock: str) -> "str | None":
    """What `.ready` says of a whole environment: its place, its Python and its lock. None where its Python
    does not start.
    """
    python = os.path.join(folder, "bin", "python")
    try:
        version = subprocess.check_output(
            [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    with open(lock, "rb") as content:
        digest = hashlib.sha256(content.read()).hexdigest()
    return f"folder {os.path.realpath(folder)}\npython {version.decode().strip()}\nlock {digest}\n"


def read(path: str) -> "str | None":
    try:
        with open(path) as content:
            return content.read()
    except OSError:
        return None


def refuse(found: str, expected: str, remedy: str) -> int:
    print(f"python: {found}; {expected}. {remedy}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(
        main(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "--this-python" in sys.argv[1:])
    )
