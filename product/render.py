"""compose.override.yaml, from the template beside this module."""

from __future__ import annotations

from pathlib import Path

import jinja2

from forge import modes

OVERRIDE = "compose.override.yaml"
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,
)


def override(image: str, device: str, server: str, memory_gb: int) -> str:
    """compose.override.yaml for an image tag; `device` is `cpu` or `cuda`, `server` the name that the server
    answers with, and `memory_gb` the container's limit.
    """
    template = _TEMPLATES.get_template(f"{OVERRIDE}.j2")
    return template.render(image=image, device=device, server=server, memory_gb=memory_gb)


def write_override(repo: Path, image: str, device: str, server: str, memory_gb: int) -> Path:
    """Writes it into the clone's root, whole or not at all, also in a power cut."""
    path = repo / OVERRIDE
    modes.write(path, override(image, device, server, memory_gb))
    return path
