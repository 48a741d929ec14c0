"""Where a base came from: `origin.json`, which stage base writes beside a checkpoint of the hub."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from model.weights.paths import CheckpointError, read_json

FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """A repository of the Hugging Face hub, and its commit in 40 hex digits."""

    repository: str
    commit: str


def write(folder: Path, origin: Origin) -> None:
    """Writes the file, also in place of a link to another one."""
    (folder / FILE).unlink(missing_ok=True)
    (folder / FILE).write_text(json.dumps(asdict(origin)) + "\n")


def read(folder: Path) -> Origin | None:
    """The origin of a base; None for one that is not of the hub. Raises CheckpointError for a file that
    holds something else.
    """
    if not (folder / FILE).exists():
        return None
    values = read_json(folder / FILE)
    repository, commit = (str(values.get(name, "")) for name in ("repository", "commit"))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?@[0-9a-f]{40}", f"{repository}@{commit}", re.ASCII):
        raise CheckpointError(
            f"{FILE} with repository {repository!r} and commit {commit!r}",
            "a repository of the hub, and a commit of 40 hex digits",
            f"Remove {FILE} from the base's folder: stage base writes it.",
        )
    return Origin(repository, commit)
