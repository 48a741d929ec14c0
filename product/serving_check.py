"""Whether the server that answers is the one that was started, and its model the one that was built."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.finding import Refused, error
from product import SERVER, loopback

SERVER_HEADER = "x-annie-server"
ANSWER_SECONDS = 600
READY_SECONDS = 1800  # a 19 GB checkpoint from a cold disk, CUDA graphs included


@dataclass(frozen=True)
class Endpoint:
    """Where a server answers on this machine, the key that it asks for ("" for none), its name, and the
    address that it listens on.
    """

    port: int
    key: str
    server: str
    bind: str = "127.0.0.1"

    def opened(self, path: str, seconds: float, body: dict[str, Any] | None = None) -> Any:
        """The open answer. OSError if there is none, or one with an error status."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = json.dumps(body).encode() if body is not None else None
        if data is not None:
            headers["Content-Type"] = "application/json"
        host = "127.0.0.1" if self.bind == "0.0.0.0" else f"[{self.bind}]" if ":" in self.bind else self.bind
        request = urllib.request.Request(f"http://{host}:{self.port}{path}", data, headers)
        return loopback.opened(request, seconds, here=True)


def refuse_taken(address: str, port: int, remedy: str) -> None:
    """Refused where another program listens on a port. Found now rather than after the model has loaded."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left is free
        try:
            probe.bind((address, port))
        except OSError as fault:
            raise Refused(
                error("serve", f"port {port}, which cannot be used ({fault.strerror})", "a free port", remedy)
            ) from fault


def wait(endpoint: Endpoint, why_dead: Callable[[], str | None], on_wait: Callable[[float], None]) -> None:
    """Returns when the server answers under its name. `why_dead` says why it cannot come up any more, if so;
    `on_wait` gets the seconds since the start. Refused if another program answers, or none in time.
    """
    began = time.monotonic()
    while (passed := time.monotonic() - began) < READY_SECONDS:
        if why := why_dead():
            raise Refused(error("serve", why, "a server that answers", "Its log says why."))
        try:
            with endpoint.opened("/health", 5) as answer:
                server = answer.headers.get(SERVER_HEADER, "")
        except OSError:
            on_wait(passed)
            time.sleep(1)
            continue
        if server != endpoint.server:
            other = f"the server {server}" if server else "another program"
            raise Refused(
                error(
                    "serve",
                    f"port {endpoint.port}, on which {other} answers",
                    f"the server {endpoint.server}, which was just started",
                    "Stop the other one, or name another --port.",
                )
            )
        return
    raise Refused(
        error("serve", f"no answer after {READY_SECONDS} s", "a server that answers", "Its log says why.")
    )


def check(endpoint: Endpoint, folder: Path) -> str:
    """Asks a question that the base answers wrongly, and returns a line about the answer. Refused if the
    answer is the base's, or fails the question's own checks.
    """
    question, server = (json.loads((folder / name).read_text()) for name in ("check.json", "serve.json"))
    if why := question.get("left_out"):
        return f"not checked: {why}"
    answer = _answer(endpoint, question, server)
    remedy = (
        "What is served is not what was evaluated. See its log; build it again with --only package --force."
    )
    tuned, base = shortened(answer), shortened(question["base"])
    expected = f"the tuned model's answer: {shortened(question['expected'])}"
    if spoken(answer) == question["base"]:
        raise Refused(error("serve", f"{tuned}, which the base answers too", expected, remedy))
    if failures := _failures(folder, question, answer):
        raise Refused(error("serve", f"{tuned}: {'; '.join(failures)}", expected, remedy))
    return f"it answers as the {server['serves']} model: {tuned} (the base: {base})"


def _answer(endpoint: Endpoint, question: dict[str, Any], server: dict[str, Any]) -> dict[str, Any]:
    body = {
        "model": server["served_name"],
        "messages": question["messages"],
        "temperature": 0,
        "seed": 0,
        "max_tokens": question["max_tokens"],
        "chat_template_kwargs": server["chat_template_kwargs"],
        **({"tools": question["tools"]} if question["tools"] else {}),
    }
    try:
        with endpoint.opened("/v1/chat/completions", ANSWER_SECONDS, body) as response:
            choice = json.load(response)["choices"][0]
            return {**choice["message"], "finish_reason": choice["finish_reason"]}
    except (OSError, ValueError, LookupError) as fault:
        raise Refused(
            error(
                "serve",
                f"a question of the evaluation got no answer: {fault}",
                "an answer",
                "The server's log says why.",
            )
        ) from fault


def _failures(folder: Path, question: dict[str, Any], answer: dict[str, Any]) -> list[str]:
    """What the artifact's own checks, those of the evaluation, say of an answer."""
    done = subprocess.run(
        [sys.executable, "-E", "-s", "-B", "-m", "stages.serving.checks"],
        cwd=(folder / SERVER).parents[1],
        input=json.dumps({"question": question, "answer": answer}),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Refused(
            error(
                "serve",
                f"the artifact's checks failed: {done.stderr.strip()[-300:]}",
                "a verdict",
                "Build it again with --only package --force.",
            )
        )
    return [f"{failure['mode']} ({failure['detail']})" for failure in json.loads(done.stdout)]


def spoken(answer: dict[str, Any]) -> dict[str, Any]:
    """What a user gets of an answer: its text, and the calls that it makes."""
    calls = [
        {"function": {key: call["function"][key] for key in ("name", "arguments")}}
        for call in answer.get("tool_calls") or []
    ]
    return {"content": answer.get("content"), "tool_calls": calls}


def shortened(answer: dict[str, Any]) -> str:
    """An answer in a few words."""
    calls = [f"{call['function']['name']}(...)" for call in answer.get("tool_calls") or []]
    text = " ".join([*(answer.get("content") or "").split(), *calls])
    return json.dumps(text if len(text) <= 60 else f"{text[:57]}...", ensure_ascii=False)
