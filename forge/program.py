"""A stage as it is started: its code, on the environment that it runs in.

Executors that run stages from files start the repository's own. Others make an image:
stages/<name>/Dockerfile on the environment's, from a context that holds what the stage's imports reach and
its contract.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from forge import code, hashing
from forge import image as images
from forge.image import Image

DOCKERFILE = "Dockerfile"
_EPOCH = 0  # of every file in a context: the same files give the same layer


@dataclass(frozen=True)
class Program:
    """`start` is another module of its folder that is started in its place, such as `warm`."""

    stage: str
    environment: Image
    repo: Path
    start: str = ""

    @property
    def module(self) -> str:
        """What `python -m` is given."""
        return f"stages.{self.stage}" + (f".{self.start}" if self.start else "")

    @property
    def own(self) -> bool:
        """Whether it is what the image starts by itself: the stage."""
        return not self.start

    @property
    def dockerfile(self) -> Path:
        return self.repo / "stages" / self.stage / DOCKERFILE

    def files(self) -> list[Path]:
        """What goes into its image: sorted paths, relative to `repo`. Refused as `code.closure` is."""
        contract = Path("stages", self.stage, "stage.toml")
        beside = [contract] if (self.repo / contract).is_file() else []
        return sorted([*code.closure(self.repo, self.stage), *beside])

    def fingerprint(self, executor: str) -> str:
        """Twelve hex digits that name the image's tag: its environment, Dockerfile and files."""
        named = {str(path): _digest(self.repo / path) for path in self.files()}
        named |= {DOCKERFILE: _digest(self.dockerfile)}
        return hashing.of_value(named | images.components(self.environment, executor))[:12]

    def copy(self, folder: Path) -> None:
        """Fills an empty folder, the context of the image's build, with its files, readable by any user."""
        for path in self.files():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((self.repo / path).read_bytes())
            target.chmod(0o644)
        for path in [*folder.rglob("*"), folder]:
            if path.is_dir():
                path.chmod(0o755)
            os.utime(path, (_EPOCH, _EPOCH))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
