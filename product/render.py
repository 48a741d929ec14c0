"""compose.override.yaml, from the template beside this module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from forge import modes

OVERRIDE = "compose.override.yaml"
SERVICE = "vllm-nemotron-annie"  # of compose.yaml
OTHER = "other"  # the profile of a service that is not the newest recipe's
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,
)


def override(image: str, server: str, origin: str, described: dict[str, Any]) -> str:
    """compose.override.yaml for an image tag. `server` is the name that the server answers with, `origin`
    what it was made from, in words, and `described` the content of serve.json. Another service than
    compose.yaml's is defined as an extension of it.
    """
    template = _TEMPLATES.get_template(f"{OVERRIDE}.j2")
    values = {name: described[name] for name in ("service", "device", "memory_gb")}
    return template.render(image=image, server=server, origin=origin, base=SERVICE, other=OTHER, **values)


def write_override(repo: Path, image: str, server: str, origin: str, described: dict[str, Any]) -> None:
    """Writes it into the clone's root, whole or not at all, also in a power cut."""
    modes.write(repo / OVERRIDE, override(image, server, origin, described))
