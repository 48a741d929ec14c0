"""Files that are generated, from the templates beside this module."""

from __future__ import annotations

import shlex
from pathlib import Path

import jinja2

from forge import modes
from forge.mask import Mask

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,
)


def script(stage: str, note: str, commands: list[list[str]]) -> str:
    """A script that does by hand what an executor did for `stage`; `note` is a sentence. A password in a
    proxy's address is left out of it.
    """
    text: str = _TEMPLATES.get_template("run.sh.j2").render(
        stage=stage, note=note, commands=[shlex.join(command) for command in commands]
    )
    return Mask().text(text)


def write_script(path: Path, stage: str, note: str, commands: list[list[str]]) -> None:
    modes.write(path, script(stage, note, commands), executable=True)
