"""Reads what production sends with every request: the system prompt and the tools."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from model.families.messages import ChatError, served_tools
from stages import dataset, job
from stages.conversations import content
from stages.job import StageError

SHAPE = (
    'a JSON list such as [{"type": "function", "function": {"name": ..., "description": ..., "parameters":'
    " {...}}}]"
)


def read_prompt(path: Path) -> str:
    """The production prompt with LF at line ends, without a byte order mark and surrounding blanks. Raises
    StageError if the file holds none.
    """
    return content.read_text(path, "the production system prompt").strip()


def read_tools(path: Path) -> list[dict[str, Any]]:
    """The production tools in the form that the server gives to the template. The file holds a list, or an
    object with the list under `tools`.

    Raises StageError for any other content, for a tool without a name, and for two tools with one name.
    """
    try:
        value = dataset.parse(content.read_text(path, "the production tools"))
    except ValueError as error:
        raise StageError(
            f"the tools file {path.name} is {error}", SHAPE, "Name the right file in the recipe, or mend it."
        ) from error
    if isinstance(value, dict) and isinstance(value.get("tools"), list):
        value = value["tools"]
    if not isinstance(value, list):
        raise StageError(
            f"the tools file {path.name} holds {_description(value)}", SHAPE, "Put the tools into a list."
        )
    try:
        tools = served_tools(value)
    except ChatError as error:
        raise StageError(f"the tools file {path.name}: {error}", SHAPE, "Mend that tool.") from error
    names = Counter(tool["function"]["name"] for tool in tools)
    if duplicates := [name for name, count in names.items() if count > 1]:
        raise StageError(
            f"{path.name} has several tools called {', '.join(duplicates)}",
            "one of each name",
            "Remove or rename the others.",
        )
    if undescribed := [
        name for name, tool in zip(names, tools, strict=False) if tool["function"]["description"] is None
    ]:
        job.warning(
            f"{path.name} has tools without a description: {', '.join(undescribed)}",
            "the template writes the word None for it, in training as in serving; describe them",
        )
    return tools


def _description(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(map(repr, list(value)[:5])) or 'none'}"
    return "a list" if isinstance(value, list) else f"{type(value).__name__} {str(value)[:40]!r}"
