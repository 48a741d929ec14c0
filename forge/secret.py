"""Secrets that a recipe does not name, from where other tools look for them: a variable of the environment,
or a file of the user. A contract says which (docs/formats.md, stage.toml).

Only a stage with the network gets one, as a file: it has no other use for it, and its environment is seen by
everything that it starts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from forge import modes
from forge.recipe import Recipe


@dataclass(frozen=True)
class Found:
    """A secret and where it was found: in a variable, which has a `value`, or else in the file `path`."""

    name: str
    place: str
    path: Path | None = None
    value: str = ""


def found(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> list[Found]:
    """The secrets that stages with the network take and the recipe does not name, as far as there are any."""
    wanted = {
        name: secret
        for step in recipe.stages.values()
        if step.needs.network
        for name, secret in step.contract.secrets.items()
        if name not in recipe.secrets
    }
    secrets = []
    for name, secret in wanted.items():
        if secret.variable and (value := environment.get(secret.variable, "").strip()):
            secrets.append(Found(name, f"the variable {secret.variable}", value=value))
        elif path := next(filter(Path.is_file, _files(secret.files, environment)), None):
            secrets.append(Found(name, str(path), path))
    return secrets


def _files(files: tuple[str, ...], environment: Mapping[str, str]) -> Iterator[Path]:
    """The files, with the variables that they begin with; one whose variable is not set is left out."""
    for text in files:
        first, _, rest = text.partition("/")
        start = environment.get(first[1:], "") if first.startswith("$") else os.path.expanduser(first)
        if start:
            yield Path(start) / rest if rest else Path(start)


@contextlib.contextmanager
def with_files(recipe: Recipe, folder: Path) -> Iterator[Recipe]:
    """The recipe with a file for each secret that was found. What stood in a variable is written below
    `folder`, for this user alone, and removed at the end.
    """
    secrets = found(recipe)
    if not secrets:
        yield recipe
        return
    private = Path(tempfile.mkdtemp(prefix="secrets-", dir=modes.make_folder(folder)))
    try:
        paths = {secret.name: secret.path or _written(private, secret) for secret in secrets}
        yield replace(recipe, secrets={**recipe.secrets, **paths})
    finally:
        shutil.rmtree(private)


def _written(folder: Path, secret: Found) -> Path:
    path = folder / secret.name
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(secret.value + "\n")
    return path
