"""Reading conversations: every line becomes a row or a reject with its reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron import chat
from stages import dataset
from stages.job import StageError

HEAD = 200  # characters of a bad line that rejects.jsonl keeps


@dataclass(frozen=True)
class Row:
    file: str
    line: int
    messages: list[dict]
    tools: list[dict] | None
    category: str
    head: str

    @property
    def content(self) -> str:
        """What makes two rows the same: everything but where they stand and what they are filed under."""
        return json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False)

    @property
    def prompt(self) -> str:
        """The system prompt, "" if the conversation has none."""
        first = self.messages[0]
        return str(first.get("content") or "") if first["role"] == "system" else ""


@dataclass(frozen=True)
class Reject:
    file: str
    line: int
    reason: str
    head: str


def files(sources: list[Path]) -> dict[str, Path]:
    """Name -> JSONL file, in the order of `sources`, a folder's files in the order of their names.

    A name starts at its source, such as `conversations/direct_action.jsonl`; where two sources share it, the later says which.
    """
    found: dict[str, Path] = {}
    for number, source in enumerate(sources, 1):
        paths = sorted(source.rglob("*.jsonl")) if source.is_dir() else [source]
        if not paths:
            raise StageError(f"no .jsonl file in {source.name}", "at least one in every folder of the sources", "Check `sources.conversations` in the recipe.")
        for path in paths:
            name = str(path.relative_to(source.parent))
            found[f"{name} (source {number})" if name in found else name] = path
    return found


def read(name: str, path: Path) -> Iterator[Row | Reject]:
    """Every line of one file that is not blank. Read as bytes: a file cut off by a crash may end in NULs or half a character."""
    with path.open("rb") as opened:
        for number, raw in dataset.lines(opened):
            try:
                yield parse(raw, name, number, path.stem)
            except chat.ChatError as error:
                yield Reject(name, number, str(error), head(raw))


def head(raw: bytes) -> str:
    return raw[:HEAD].decode("utf-8", "replace")


def parse(raw: bytes, file: str, line: int, category: str) -> Row:
    """One row, checked and with tool arguments as mappings. Raises ChatError with the reason."""
    if b"\0" in raw:
        raise chat.ChatError("NUL bytes: the file was cut off while it was written")
    try:
        value = dataset.parse(raw)
    except ValueError as error:
        raise chat.ChatError(str(error)) from error
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list) or not value["messages"]:
        raise chat.ChatError("no list of messages")
    messages = value["messages"]
    for position, message in enumerate(messages, 1):
        check(message, position)
    if not any(m["role"] == "assistant" for m in messages):
        raise chat.ChatError("no assistant turn: nothing to train on")
    tools = value.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(map(named, tools))):
        raise chat.ChatError("tools is not a list of functions with names")
    row = Row(file, line, chat.normalise(messages), tools or None, str(value.get("category") or category), head(raw))
    try:
        (row.content + row.category).encode()
    except UnicodeEncodeError as error:
        raise chat.ChatError("half a surrogate pair: a character was cut in two") from error
    return row


def named(tool: Any) -> bool:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def check(message: Any, position: int) -> None:
    if not isinstance(message, dict):
        raise chat.ChatError(f"message {position} is not an object")
    role = message.get("role")
    if role not in chat.ROLES:
        raise chat.ChatError(f"message {position} has the unknown role {role!r}; known are {', '.join(chat.ROLES)}")
    if role == "system" and position > 1:
        raise chat.ChatError(f"message {position} is a second system prompt")
    content = message.get("content")
    # Only a turn that calls a tool may be without text: the template would write the word None for the others.
    if not isinstance(content, str) and not (content is None and role == "assistant"):
        raise chat.ChatError(f"content of message {position} is {'null' if content is None else type(content).__name__}, not text")
    if role == "assistant" and not (content or "").strip() and not message.get("tool_calls"):
        raise chat.ChatError(f"message {position} is an empty assistant turn")
