"""What stands between clients and vLLM's API: a key, limits, tool calls that arrive whole, a calm end.

vLLM loads `Front` with `--middleware` and runs it in the process of its API server, so it needs no port of
its own. Its settings are in the environment variable `ANNIE_FRONT` (see `Settings`).

| request | what the front does |
|---|---|
| without the key, where one is set | 401, on every route |
| a route that is not in `ROUTES` | 404 |
| a `Host` of another site, where no key is set | 403: a web page must not reach a server on loopback |
| too large, too many choices, too many tokens | 413, or 400 with the limit |
| a control token in a message | 400 with its name: it would open a turn that nobody wrote |
| a field of a type that vLLM cannot take | 400 with its name |
| a chat without a system prompt | gets the production prompt, where `default_prompt` says so |
| more than can wait | 429 |
| a chat with tools, not streamed | streamed from vLLM and put together here: both ways give the same |
| a call that the client forces, streamed | without the text `<tool_call>` that vLLM sends before it |
| after SIGTERM | 503; those under way may end within the grace period, then they get an error |

vLLM 0.32 needs the two lines on tool calls: unstreamed, it gives a call that `max_tokens` has cut the
arguments `{}` and `finish_reason` "tool_calls". After SIGTERM it ends its engine at once and leaves clients
waiting.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import os
import signal
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.serving import request as requests
from stages.serving import tool_calls
from stages.serving.request import Refusal

VARIABLE = "ANNIE_FRONT"
SERVER_HEADER = b"x-annie-server"
PROMPT_HEADER = (b"x-annie-prompt", b"inserted")
BODY_SECONDS = 60  # for a client to send its request
READ_ON = 8  # times the limit of a body
CHAT = "/v1/chat/completions"
GENERATES = (CHAT, "/v1/completions")
PROMPTED = (CHAT, "/tokenize")  # with messages, the two agree on a prompt
# Reads: what monitors and clients of these two ask.
ROUTES = (*GENERATES, "/v1/models", "/health", "/ping", "/metrics", "/version", "/tokenize", "/detokenize")

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Settings:
    """`server` names this server in the header of its answers. `key_sha256` is empty where no key is asked.
    `refused` are the strings that no message may hold. `running` requests are answered at the same time,
    `waiting` more may wait. `grace` is in seconds. `default_prompt` is the file of the production prompt,
    which a chat without one gets; empty where none is added.
    """

    server: str
    key_sha256: str = ""
    refused: tuple[str, ...] = ()
    choices: int = 8
    tokens: int = 2**31
    body: int = 4 * 2**20
    running: int = 4
    waiting: int = 32
    grace: float = 20.0
    default_prompt: str = ""

    @classmethod
    def from_environment(cls) -> Settings:
        values = json.loads(os.environ[VARIABLE])
        return cls(**{**values, "refused": tuple(values.get("refused", ()))})

    def as_variable(self) -> str:
        return json.dumps(self.__dict__)


@dataclass(eq=False)
class Exchange:
    """A request under way. `weight` is the number of answers that it asks for."""

    weight: int
    task: asyncio.Task[None] | None = None
    started: bool = False
    streams: bool = False
    finished: bool = False


class Front:
    """An ASGI middleware."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]):
        self.app, self.settings = app, Settings.from_environment()
        self.refused = requests.any_of(self.settings.refused)
        path = self.settings.default_prompt
        self.prompt = Path(path).read_text().strip() if path else ""
        self.under_way: set[Exchange] = set()
        self.draining = False
        self._ending: asyncio.Task[None] | None = None  # a task that nobody holds may be collected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            # vLLM has set its own handlers by now. SIGINT stays vLLM's; SIGTERM is ours until all is drained.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._drain)
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:  # a websocket: closed before it is accepted, which clients see as 403
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._admit(scope)
            if scope["method"] != "POST":
                await self.app(scope, receive, self._named(send))
                return
            body = await self._body(receive)
            await self._exchange(scope, body, receive, send)
        except Refusal as refusal:
            await _answer(send, refusal.status, _error(refusal.status, refusal.text), refusal.headers)

    # --- who may ask ----------------------------------------------------------------------------------------

    def _admit(self, scope: Scope) -> None:
        """Refusal of a request by its head alone."""
        headers = dict(scope["headers"])
        if expected := self.settings.key_sha256:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            digest = hashlib.sha256(key.strip()).hexdigest()
            if not hmac.compare_digest(digest, expected) or scheme.lower() != b"bearer":
                raise Refusal(
                    401,
                    "This server asks for its key: send the header Authorization: Bearer KEY.",
                    ((b"www-authenticate", b"Bearer"),),
                )
        elif not _local_name(headers.get(b"host", b"localhost").decode("latin-1")):
            raise Refusal(403, "Without a key this server answers to its address or a local name alone.")
        if scope["path"] not in ROUTES:
            raise Refusal(404, f"Not served here. What is: {', '.join(ROUTES)}.")
        self._refuse_while_draining()

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise Refusal(503, "This server is ending.", ((b"retry-after", b"30"), (b"connection", b"close")))

    async def _body(self, receive: Receive) -> bytes:
        """The request's body, of limited size, in limited time."""
        limit = self.settings.body
        body, size, more = bytearray(), 0, True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                # One that is too large is read on for a while: a client that still sends sees no answer.
                while more and size <= READ_ON * limit:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "The request ended early.")
                    size += len(message.get("body", b""))
                    body += message.get("body", b"") if size <= limit else b""
                    more = message.get("more_body", False)
        except TimeoutError:
            raise Refusal(408, f"The request took longer than {BODY_SECONDS} s to arrive.") from None
        if size > limit:
            raise Refusal(413, f"A request may have {limit:,} bytes.", ((b"connection", b"close"),))
        return bytes(body)

    # --- one answer -----------------------------------------------------------------------------------------

    async def _exchange(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Passes a request on, and its answer back, unless the server ends first."""
        path = scope["path"]
        settings = self.settings
        request, weight = requests.checked(body, settings.choices, settings.tokens, self.refused)
        self._refuse_while_draining()  # it may have begun while the body came
        exchange = Exchange(weight if path in GENERATES else 0)
        room = settings.running + settings.waiting
        if exchange.weight and sum(e.weight for e in self.under_way) + exchange.weight > room:
            raise Refusal(
                429, f"{room} answers are under way or waiting; try again.", ((b"retry-after", b"1"),)
            )
        self.under_way.add(exchange)
        try:
            exchange.task = asyncio.create_task(self._pass(exchange, scope, request, body, receive, send))
            await exchange.task
        except asyncio.CancelledError:
            if not self.draining or exchange.finished:
                raise
            await self._cut_off(exchange, send)
        finally:
            self.under_way.discard(exchange)

    async def _pass(
        self,
        exchange: Exchange,
        scope: Scope,
        request: dict[str, Any] | None,
        body: bytes,
        receive: Receive,
        send: Send,
    ) -> None:
        send = self._watched(exchange, self._named(send))
        if prompted := self._prompted(scope["path"], request):
            request, body = prompted, json.dumps(prompted).encode()
            send = _with_header(send, PROMPT_HEADER)
        if request and scope["path"] == CHAT and request.get("tools"):
            send = tool_calls.Repaired(request, send)
            body = json.dumps(tool_calls.streamed(request)).encode()
        sizes = (b"content-length", b"transfer-encoding")
        headers = [(name, value) for name, value in scope["headers"] if name not in sizes]
        headers.append((b"content-length", str(len(body)).encode()))
        await self.app({**scope, "headers": headers}, _replayed(body, receive), send)

    def _prompted(self, path: str, request: dict[str, Any] | None) -> dict[str, Any] | None:
        """The request with the production prompt; None where it needs none, or this server adds none."""
        return requests.with_prompt(request, self.prompt) if self.prompt and path in PROMPTED else None

    def _named(self, send: Send) -> Send:
        """`send` with this server's name in the answer's head."""
        return _with_header(send, (SERVER_HEADER, self.settings.server.encode()))

    def _watched(self, exchange: Exchange, send: Send) -> Send:
        """`send` that notes how far an answer has come."""

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.started = True
                exchange.streams = (
                    dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
                )
            elif not message.get("more_body"):
                exchange.finished = True
            await send(message)

        return watched

    # --- the end --------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Takes no further request, and ends vLLM when those under way have ended, at the latest after the
        grace period.
        """
        if not self.draining:
            self.draining = True
            self._ending = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        tasks = [exchange.task for exchange in self.under_way if exchange.task]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self.settings.grace)
            for task in late:
                task.cancel()
            await asyncio.sleep(0.1)  # what they say last has to leave
        os.kill(os.getpid(), signal.SIGINT)

    async def _cut_off(self, exchange: Exchange, send: Send) -> None:
        """Tells a client that its answer ends here. A half answer must not look like a whole one."""
        error = _error(503, "The server ended before the answer did.")
        if not exchange.started:
            await _answer(send, 503, error, ((b"connection", b"close"),))
        elif exchange.streams:
            await send({"type": "http.response.body", "body": b"data: " + error + b"\n\n"})


def _with_header(send: Send, header: tuple[bytes, bytes]) -> Send:
    """`send` with one more header in the answer's head."""

    async def with_header(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), header]}
        await send(message)

    return with_header


def _local_name(host: str) -> bool:
    """Whether a `Host` is an address or a name that no public site can have."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    name = name.strip("[]").rstrip(".").lower()
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return "." not in name or name.endswith((".local", ".localhost", ".internal"))


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives a body which was read already, and then what comes: the client hanging up."""
    read = False

    async def replayed() -> Message:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _error(status: int, text: str) -> bytes:
    """An error as OpenAI's API has it."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )
    return json.dumps({"error": {"message": text, "type": kind, "code": status}}).encode()


async def _answer(send: Send, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> None:
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*head, *headers]})
    await send({"type": "http.response.body", "body": body})
