"""A chat in the terminal with what is being served: streaming, with the production prompt and tools."""

from __future__ import annotations

import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from forge.finding import Refused, error
from product import loopback, serving_record

REPO = Path(__file__).resolve().parent.parent
HELP = "/reset starts over, /exit leaves"
ANSWER_SECONDS = 600
# Control characters but for line breaks and tabs. In a terminal they change its title, its clipboard and
# what it shows; an answer is text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@dataclass
class Conversation:
    """`messages` starts with the system prompt; every turn is added to it. `assistant` is the name at its
    answers.
    """

    url: str
    model: str
    key: str
    system: str
    tools: list[dict[str, Any]]
    kwargs: dict[str, Any]
    assistant: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    cut: str = ""  # why the last turn is not whole

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}]

    def turn(self) -> Iterator[str]:
        """Asks for the next turn, yields its text as it comes, and adds it with its tool calls. Refused if
        nobody answers.
        """
        body = {
            "model": self.model,
            "messages": self.messages,
            "stream": True,
            "temperature": 0,
            "chat_template_kwargs": self.kwargs,
        }
        if self.tools:
            body["tools"] = self.tools
        text = ""
        calls: dict[int, dict[str, Any]] = {}
        self.cut = ""
        for delta in deltas(f"{self.url}/v1/chat/completions", self.key, body):
            self.cut = delta.get("cut") or self.cut
            if delta.get("content"):
                text += delta["content"]
                yield delta["content"]
            for part in delta.get("tool_calls") or []:
                call = calls.setdefault(
                    part["index"], {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
                )
                call["id"] = part.get("id") or call["id"]
                for key, value in (part.get("function") or {}).items():
                    call["function"][key] += value or ""
        turn: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            turn["tool_calls"] = [calls[index] for index in sorted(calls)]
        self.messages.append(turn)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Tool calls of the last turn."""
        return self.messages[-1].get("tool_calls") or []


def deltas(url: str, key: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The deltas of a streamed chat completion (server-sent events). Refused if the server cannot be asked,
    reports an error, or ends the stream before the answer has ended.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    finished = False
    try:
        with loopback.opened(request, ANSWER_SECONDS) as response:
            for line in response:
                data = line.decode(errors="replace").strip().removeprefix("data: ")
                if data == "[DONE]":
                    break
                chunk = json.loads(data) if data else {}
                if "error" in chunk:
                    raise _cut_off(str(chunk["error"].get("message", chunk["error"])))
                for choice in chunk.get("choices") or []:
                    yield choice["delta"]
                    if reason := choice.get("finish_reason"):
                        finished = True
                        if reason == "length":
                            yield {"cut": "the answer has reached its longest length"}
    except urllib.error.HTTPError as fault:
        remedy = {
            401: "Name its key: --api-key-file FILE.",
            404: f"It serves another model than {body['model']}. Serve that one: make serve.",
        }.get(fault.code, "Start over with /reset.")
        raise Refused(
            error(
                "chat",
                f"the server refused ({fault.code}): {fault.read().decode(errors='replace')[:300]}",
                "an answer",
                remedy,
            )
        ) from fault
    except (OSError, http.client.HTTPException) as fault:
        raise Refused(
            error("chat", f"no answer from {url} ({fault})", "a server", "Start it: make serve.")
        ) from fault
    except (ValueError, LookupError, AttributeError, TypeError) as fault:
        raise _cut_off(f"the server sent no chat completion ({fault})") from fault
    if not finished:
        raise _cut_off("the stream ended in the middle")


def _cut_off(why: str) -> Refused:
    return Refused(
        error(
            "chat",
            f"an answer that was cut off: {why}",
            "a whole answer",
            "What is shown of it is not what the model would have said. See the server's log.",
        )
    )


def shown(call: dict[str, Any]) -> str:
    """`set_timer(minutes=5)` for a tool call."""
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except json.JSONDecodeError:
        return f"{function['name']}({function['arguments']})"
    shown = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())
    return f"{function['name']}({', '.join(shown)})"


def printable(text: str) -> str:
    """Text as a terminal may show it: each control character as its code, such as \\x1b."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def chat(url: str, prompt: str | None = None, key_file: Path | None = None) -> int:
    """Chats until /exit or the end of stdin; with `prompt` asks that and nothing else. Returns the exit
    status.
    """
    key = loopback.read_key("chat", key_file) if key_file else ""
    folder = serving_record.served_artifact(Path(os.environ.get("ANNIE_HOME", REPO / ".annie")))
    server = json.loads((folder / "serve.json").read_text())
    conversation = Conversation(
        url.rstrip("/"),
        server["served_name"],
        key,
        (folder / "prompt.txt").read_text().strip(),
        json.loads((folder / "tools.json").read_text()),
        server["chat_template_kwargs"],
        server.get("assistant", server["served_name"]),  # before 2026-12 there was none
    )
    console = Console(highlight=False, soft_wrap=True)
    if prompt:
        say(console, conversation, {"role": "user", "content": prompt})
        return 0
    interactive = sys.stdin.isatty()
    if interactive:
        console.print(f"[dim]{server['served_name']} at {url}; {HELP}[/dim]")
    try:
        while True:
            line = _input(console, "[bold]you[/bold]  ", interactive)
            if line == "/exit":
                return 0
            if line == "/reset":
                conversation.reset()
            elif line:
                say(console, conversation, {"role": "user", "content": line})
                for call in conversation.calls:
                    result = (
                        _input(
                            console,
                            f"[dim]result of {call['function']['name']} (return: nothing)[/dim]  ",
                            interactive,
                        )
                        if interactive
                        else ""
                    )
                    conversation.messages.append(
                        {"role": "tool", "tool_call_id": call["id"], "content": result}
                    )
                if (
                    interactive
                    and conversation.messages[-1]["role"] == "tool"
                    and conversation.messages[-1]["content"]
                ):
                    say(console, conversation, None)
    except (EOFError, KeyboardInterrupt):
        return 0


def _input(console: Console, label: str, interactive: bool) -> str:
    return (console.input(label) if interactive else input()).strip()


def say(console: Console, conversation: Conversation, message: dict[str, Any] | None) -> None:
    """One exchange; a turn that fails is taken out of the conversation again."""
    before = len(conversation.messages)
    if message:
        conversation.messages.append(message)
    console.print(printable(conversation.assistant), style="bold cyan", markup=False, end="  ")
    try:
        for piece in conversation.turn():
            console.print(printable(piece), end="", markup=False)
    except Refused:
        del conversation.messages[before:]
        raise
    console.print()
    if conversation.cut:
        console.print(f"  ({conversation.cut}; it goes on from there)", style="red", markup=False)
    for call in conversation.calls:
        console.print(f"  -> {printable(shown(call))}", style="yellow", markup=False)
    if conversation.cut and conversation.calls:
        del conversation.messages[before:]  # a call that was cut must not be run, nor stand in the history
