"""Reading conversations: every line becomes a row or a reject with its reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron import chat

HEAD = 200  # characters of a bad line that rejects.jsonl keeps


@dataclass(frozen=True)
class Row:
    file: str
    line: int
    messages: list[dict]
    tools: list[dict] | None
    category: str

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


def files(sources: list[Path]) -> list[Path]:
    """The JSONL files that `sources` name, folders' files in the order of their names."""
    found: list[Path] = []
    for source in sources:
        found += sorted(source.rglob("*.jsonl")) if source.is_dir() else [source]
    return found


def read(path: Path) -> Iterator[Row | Reject]:
    """Every non-empty line of one file. Read as bytes: a file cut off by a crash may end in NULs or half a character."""
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            yield parse(raw, path.name, number, path.stem)
        except chat.ChatError as error:
            yield Reject(path.name, number, str(error), raw[:HEAD].decode("utf-8", "replace"))


def parse(raw: bytes, file: str, line: int, category: str) -> Row:
    """One row, checked and with tool arguments as mappings. Raises ChatError with the reason."""
    if b"\0" in raw:
        raise chat.ChatError("NUL bytes: the file was cut off while it was written")
    try:
        value = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise chat.ChatError(f"not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list) or not value["messages"]:
        raise chat.ChatError("no list of messages")
    messages = value["messages"]
    for position, message in enumerate(messages, 1):
        check(message, position)
    if not any(m["role"] == "assistant" for m in messages):
        raise chat.ChatError("no assistant turn: nothing to train on")
    tools = value.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise chat.ChatError("tools is not a list of objects")
    return Row(file, line, chat.normalise(messages), tools or None, str(value.get("category") or category))


def check(message: Any, position: int) -> None:
    if not isinstance(message, dict):
        raise chat.ChatError(f"message {position} is not an object")
    role = message.get("role")
    if role not in chat.ROLES:
        raise chat.ChatError(f"message {position} has the unknown role {role!r}; known are {', '.join(chat.ROLES)}")
    if role == "system" and position > 1:
        raise chat.ChatError(f"message {position} is a second system prompt")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise chat.ChatError(f"content of message {position} is {type(content).__name__}, not text")
    if role == "assistant" and not (content or "").strip() and not message.get("tool_calls"):
        raise chat.ChatError(f"message {position} is an empty assistant turn")
