"""Files that are generated, from the templates beside this module."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import jinja2

OVERRIDE = "compose.override.yaml"
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,
)


def override(image: str, device: str) -> str:
    """compose.override.yaml for an image tag; `device` is `cpu` or `cuda`."""
    return _TEMPLATES.get_template(f"{OVERRIDE}.j2").render(image=image, device=device)


def script(stage: str, note: str, commands: list[list[str]]) -> str:
    """A script that does by hand what an executor did for `stage`; `note` is a sentence."""
    return _TEMPLATES.get_template("run.sh.j2").render(
        stage=stage, note=note, commands=[shlex.join(command) for command in commands]
    )


def write_script(path: Path, stage: str, note: str, commands: list[list[str]]) -> None:
    path.write_text(script(stage, note, commands))
    path.chmod(0o755)


def write_override(repo: Path, image: str, device: str) -> Path:
    """Writes it into the clone's root, whole or not at all."""
    path = repo / OVERRIDE
    beside = path.with_suffix(".tmp")
    beside.write_text(override(image, device))
    os.replace(beside, path)
    return path
