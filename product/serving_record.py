"""What is being served from a home folder: the file serving.json, and the process that it names."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from forge import modes
from forge.finding import Refused, error
from product import PACKAGE

FILE = "serving.json"


@dataclass(frozen=True)
class Record:
    """`folder` is the serving artifact, `server` the name that the server answers with. `pid` is its
    supervisor's, None where compose runs it.
    """

    folder: str
    port: int
    server: str
    pid: int | None = None

    def alive(self) -> bool:
        """Whether the supervisor runs, and is the one that was started: numbers of processes are used
        again.
        """
        if self.pid is None:
            return False
        try:
            variables = Path(f"/proc/{self.pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False
        return f"ANNIE_SERVER={self.server}".encode() in variables


def write(home: Path, record: Record) -> None:
    """Whole or not at all, also in a power cut."""
    modes.write(home / FILE, json.dumps(asdict(record)) + "\n")


def read(home: Path) -> Record | None:
    """None where nothing was served, or the file holds something else."""
    try:
        values = json.loads((home / FILE).read_text())
        record = Record(str(values["folder"]), int(values["port"]), str(values["server"]), values["pid"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return record if record.pid is None or isinstance(record.pid, int) else None


def remove(home: Path) -> None:
    (home / FILE).unlink(missing_ok=True)


def served_artifact(home: Path) -> Path:
    """The serving artifact that a chat belongs to: what `serve` started last, else the newest one. Refused
    if there is none.
    """
    record = read(home)
    if record and (folder := Path(record.folder)).is_dir():
        return folder
    prompts = sorted(
        (home / "store" / "artifacts" / PACKAGE).glob("*/prompt.txt"), key=lambda path: path.stat().st_mtime
    )
    if not prompts:
        raise Refused(
            error("chat", f"no serving artifact in {home}", "one", "Build it: make model, or make demo.")
        )
    return prompts[-1].parent
