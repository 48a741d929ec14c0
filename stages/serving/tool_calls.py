"""A chat with tools, the same whether it is streamed or not.

vLLM parses tool calls twice: once from the whole text, once token by token. The two differ where an answer is
cut or unusual. Here every such chat is streamed, and an answer that was asked for whole is put together from
the stream. A call that `max_tokens` cut has the arguments as far as they came, and `finish_reason` "length",
as OpenAI's API has it. vLLM 0.32 closes such a call in the last chunk, so that it looks whole
(`set_timer {}`). What that chunk adds to a call is left out.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


def wants_stream(request: dict[str, Any]) -> bool | None:
    """Whether a request asks for a stream, in any form that vLLM reads as a boolean; None for what it
    refuses.
    """
    stream = request.get("stream")
    word = str(stream).lower()
    if stream is None or word in ("false", "0", "0.0", "f", "n", "no", "off"):
        return False
    return True if word in ("true", "1", "1.0", "t", "y", "yes", "on") else None


def streamed(request: dict[str, Any]) -> dict[str, Any]:
    """The request as it is sent to vLLM. One that asks for the whole answer gets its usage at the end."""
    if wants_stream(request) is False:
        return {**request, "stream": True, "stream_options": {"include_usage": True}}
    return request


def forced(request: dict[str, Any]) -> bool:
    """Whether the request leaves no choice but a call. vLLM then streams the call's markup as text."""
    choice = request.get("tool_choice")
    return choice == "required" or isinstance(choice, dict)


class Repaired:
    """An ASGI `send` for vLLM's stream, which passes on what the client asked for. An answer that is no
    stream (an error) passes as it is.
    """

    def __init__(self, request: dict[str, Any], send: Send):
        self.whole, self.forced, self.send = wants_stream(request) is False, forced(request), send
        self.start: Message | None = None
        self.passes = False
        self.rest = b""
        self.answer = Answer()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self.passes = not kind.startswith(b"text/event-stream")
            self.start = message
            if self.passes or not self.whole:
                await self.send(message)
            return
        if self.passes or message["type"] != "http.response.body":
            await self.send(message)
            return
        *events, self.rest = (self.rest + message.get("body", b"")).split(b"\n\n")
        more = message.get("more_body", False)
        if not more and self.rest:
            events.append(self.rest)
        sent = b"".join(self._event(event) for event in events)
        if not self.whole:
            await self.send({"type": "http.response.body", "body": sent, "more_body": more})
        elif not more:
            await self._send_whole()

    def _event(self, event: bytes) -> bytes:
        """An event of the stream as the client gets it."""
        data = event.removeprefix(b"data: ")
        if data.strip() == b"[DONE]" or not event.startswith(b"data: "):
            return event + b"\n\n"
        chunk = json.loads(data)
        changed = False
        for choice in chunk.get("choices", []):
            if self.forced:
                changed |= choice["delta"].pop("content", None) is not None
            if choice.get("finish_reason") == "length":  # what closes a call that the model did not close
                changed |= choice["delta"].pop("tool_calls", None) is not None
        if self.whole:
            self.answer.add(chunk)
        return b"data: " + json.dumps(chunk).encode() + b"\n\n" if changed else event + b"\n\n"

    async def _send_whole(self) -> None:
        assert self.start
        status, body = self.answer.as_response()
        content = json.dumps(body).encode()
        headers = [
            (name, value)
            for name, value in self.start["headers"]
            if name not in (b"content-type", b"content-length", b"transfer-encoding")
        ]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await self.send({**self.start, "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": content, "more_body": False})


class Answer:
    """A chat completion, put together from the chunks of its stream."""

    def __init__(self) -> None:
        self.head: dict[str, Any] = {}
        self.choices: dict[int, dict[str, Any]] = {}
        self.error: dict[str, Any] | None = None

    @classmethod
    def of_stream(cls, body: bytes) -> Answer:
        """The answer that a whole stream holds."""
        answer = cls()
        for event in body.split(b"\n\n"):
            data = event.removeprefix(b"data: ").strip()
            if data and data != b"[DONE]":
                answer.add(json.loads(data))
        return answer

    def add(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = chunk
            return
        self.head |= {n: value for n, value in chunk.items() if n != "choices" and value is not None}
        for part in chunk["choices"]:
            choice = self.choices.setdefault(
                part["index"], {"index": part["index"], "message": {"role": "assistant", "content": None}}
            )
            for name, value in part.items():
                if name == "delta":
                    _add_delta(choice["message"], value)
                elif name == "logprobs" and value:
                    _add_lists(choice.setdefault("logprobs", {}), value)
                elif name == "token_ids" and value:
                    choice.setdefault("token_ids", []).extend(value)
                elif name != "index" and value is not None:
                    choice[name] = value

    def as_response(self) -> tuple[int, dict[str, Any]]:
        """Status and body. A stream that ended early is an error, not half an answer."""
        choices = [self.choices[index] for index in sorted(self.choices)]
        if self.error is None and choices and all(choice.get("finish_reason") for choice in choices):
            for choice in choices:
                choice.setdefault("logprobs", None)
                choice["message"].setdefault("tool_calls", [])
            return 200, {**self.head, "object": "chat.completion", "choices": choices}
        error = self.error or {
            "error": {
                "message": "The engine ended before the answer did.",
                "type": "server_error",
                "code": 500,
            }
        }
        code = error["error"].get("code") if isinstance(error["error"], dict) else None
        return code if isinstance(code, int) and 400 <= code < 600 else 500, error


def _add_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        if name == "tool_calls":
            calls = message.setdefault("tool_calls", [])
            for part in value or []:
                _add_call(calls, part)
        elif name == "role":
            message[name] = value or message[name]
        elif isinstance(value, str) and value:
            message[name] = (message.get(name) or "") + value


def _add_call(calls: list[dict[str, Any]], part: dict[str, Any]) -> None:
    while len(calls) <= part["index"]:
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call = calls[part["index"]]
    call["id"] = part.get("id") or call["id"]
    for name, value in (part.get("function") or {}).items():
        call["function"][name] = call["function"].get(name, "") + (value or "")


def _add_lists(whole: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        if isinstance(value, list):
            whole.setdefault(name, []).extend(value)
        else:
            whole[name] = value
