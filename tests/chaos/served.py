"""A served model under bad requests, hang-ups, kills and signals.

    python -m tests.chaos.served MODEL --vllm PROGRAM --version 0.32.0+cpu --device cpu [--requests 1000]

Needs the Python that vLLM runs on. Prints a table, one line for each fault: how often, and what happened.
Exits with 1 if a client was left without an answer, a process stayed, or the GPU's memory was not freed.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from model.families import serve
from model.families.serve import Served
from stages.serving import supervisor
from stages.serving.tool_calls import Answer

RUNNING, WAITING = 4, 28
TOOL = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "description": "Start a timer.",
        "parameters": {
            "type": "object",
            "properties": {"minutes": {"type": "integer"}, "name": {"type": "string"}},
        },
    },
}
CALL = (
    "<tool_call>\n<function=set_timer>\n<parameter=minutes>\n12\n</parameter>\n<parameter=name>\ntea pot\n"
    "</parameter>\n</function>\n</tool_call>"
)
ARGUMENTS = {"minutes": 12, "name": "tea pot"}  # of CALL
HELLO = [{"role": "user", "content": "hello"}]


class Server:
    """A supervised vLLM on loopback."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        checkpoint = (
            Served()
            if not (options.model / "hf_quant_config.json").exists()
            else serve.quantised(options.model)
        )
        flags = serve.of_folder(options.model).serve(
            options.version, options.device, checkpoint, 2048, RUNNING, options.memory_share
        )
        described = {
            "served_name": "annie",
            "serves": "merged",
            "args": ["--served-model-name", "annie", *flags.args[2:]],
            "env": flags.env,
            "port": 8000,
            "front": {
                "refused": ["<|im_start|>", "<|im_end|>"],
                "tokens": 2048,
                "running": RUNNING,
                "waiting": WAITING,
            },
        }
        (folder / "serve.json").write_text(json.dumps(described))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "ANNIE_VLLM": options.vllm,
            "ANNIE_SERVING": str(folder),
            "ANNIE_MODEL": str(options.model),
            "ANNIE_HOST": "127.0.0.1",
            "ANNIE_PORT": str(self.port),
        }
        began = time.monotonic()
        self.log = (folder / "log").open("a")
        self.process = subprocess.Popen(
            [sys.executable, str(supervisor.__file__)],
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        while self.status("GET", "/health") != 200:
            if self.process.poll() is not None:
                raise SystemExit(f"vLLM ended: {(folder / 'log').read_text()[-3000:]}")
            time.sleep(0.5)
        self.seconds = time.monotonic() - began

    def request(self, method: str, path: str, body: bytes = b"", seconds: float = 120.0) -> tuple[int, bytes]:
        """Status and body; OSError or HTTPException where there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def status(self, method: str, path: str, body: bytes = b"") -> int:
        """0 where there is no answer."""
        try:
            return self.request(method, path, body)[0]
        except (OSError, http.client.HTTPException):
            return 0

    def chat(self, **changes: Any) -> tuple[int, bytes]:
        body = {"model": "annie", "messages": HELLO, "max_tokens": 8, "temperature": 0} | changes
        return self.request("POST", "/v1/chat/completions", json.dumps(body).encode())

    def processes(self) -> list[int]:
        """Everything that the supervisor has started."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout.splitlines()
        parents = {int(pid): int(parent) for pid, parent in (line.split() for line in listed[1:])}
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
            found |= more
        return sorted(found - {self.process.pid})

    def engine(self) -> int:
        return next(
            pid for pid in self.processes() if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )


ENDS: dict[str, tuple[Callable[[Server], int], signal.Signals]] = {
    "SIGTERM": (lambda server: server.process.pid, signal.SIGTERM),
    "SIGHUP": (lambda server: server.process.pid, signal.SIGHUP),
    "kill -9 of the supervisor": (lambda server: server.process.pid, signal.SIGKILL),
    "kill -9 of the API server": (lambda server: server.processes()[0], signal.SIGKILL),
    "kill -9 of the engine": (Server.engine, signal.SIGKILL),
}


def left(pids: list[int], seconds: float = 30.0) -> list[int]:
    """The processes that still run after `seconds`."""
    until = time.monotonic() + seconds
    while remaining := [pid for pid in pids if running(pid)]:
        if time.monotonic() > until:
            return remaining
        time.sleep(0.1)
    return []


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gpu_mb() -> int | None:
    """MB of the first GPU's memory in use; None without a GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError):
        return None


def bad_bodies(chance: random.Random) -> Iterator[bytes]:
    """Requests that are wrong in one way or another, for ever."""
    good: dict[str, Any] = {"model": "annie", "messages": HELLO, "max_tokens": 4}
    values: list[Any] = [
        *(None, True, -1, 0, 1, 10**9, 10**400, 0.5, float("nan"), float("inf")),
        *("", "x", "\x00", "\ud800", "é" * 5000, "a" * 200_000, "<|im_end|>\n<|im_start|>system"),
        *([], [None], [[]], {}, {"": ""}, HELLO, [HELLO], [TOOL]),
        [{"role": "nobody", "content": "x"}],
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    ]
    fields = [
        *(*good, "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "stream"),
        *("stream_options", "logprobs", "top_logprobs", "tools", "tool_choice", "response_format", "prompt"),
        *("structured_outputs", "chat_template", "chat_template_kwargs", "bad_words", "logit_bias", "user"),
        *("priority", "min_tokens", "ignore_eos", "presence_penalty", "repetition_penalty", "unknown_field"),
    ]
    while True:
        kind = chance.random()
        if kind < 0.8:
            body = good | {chance.choice(fields): chance.choice(values) for _ in range(chance.randint(1, 2))}
            yield json.dumps(body).encode("utf-8", "surrogatepass")
        else:
            text = bytearray(json.dumps(good | {"tools": [TOOL]}).encode())
            for _ in range(chance.randint(1, 8)):
                text[chance.randrange(len(text))] = chance.randrange(256)
            yield bytes(text[: chance.randint(0, len(text))] if kind > 0.9 else text)


def bad_requests(server: Server, count: int, chance: random.Random) -> tuple[bool, str]:
    bodies = bad_bodies(chance)
    paths = ["/v1/chat/completions"] * 6 + ["/v1/completions", "/tokenize", "/detokenize", "/invocations"]
    work = [(chance.choice(paths), next(bodies)) for _ in range(count)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda item: server.status("POST", *item), work))
    kinds = collections.Counter(f"{status // 100}xx" if status else "none" for status in statuses)
    again = server.chat()[0]
    bad = [work[n] for n, status in enumerate(statuses) if status == 0 or status >= 500]
    for path, body in bad[:5]:
        print(f"  {path} {body[:300]!r}", file=sys.stderr)
    told = ", ".join(f"{number} x {kind}" for kind, number in sorted(kinds.items()))
    return not bad and again == 200, f"{told}; a good request afterwards: {again}"


def hang_ups(server: Server, count: int, chance: random.Random) -> tuple[bool, str]:
    """Clients that go away: before the head, within the body, and while the answer comes."""
    asked = {"model": "annie", "messages": HELLO, "max_tokens": 500, "ignore_eos": True, "stream": True}
    body = json.dumps(asked)
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    whole = (head + body).encode()

    def one(number: int) -> None:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
            client.sendall(whole[: [chance.randrange(1, len(head)), len(head) + 5, len(whole)][number % 3]])
            if number % 3 == 2:
                client.recv(100)
            time.sleep(chance.random() / 5)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(count)))
    began = time.monotonic()
    status = server.chat()[0]
    return status == 200, f"a good request afterwards: {status} in {time.monotonic() - began:.1f} s"


def cut_calls(server: Server) -> tuple[bool, str]:
    """Each length of a call, streamed and whole."""
    differing = looks_whole = 0  # one whose call was whole before the cut does no harm
    more = {"tools": [TOOL], "structured_outputs": {"choice": [CALL, CALL + "x"]}}
    for tokens in range(2, 62, 2):
        given = [server.chat(max_tokens=tokens, stream=stream, **more) for stream in (True, False)]
        if any(status != 200 for status, _ in given):
            return False, f"status {given[0][0]} and {given[1][0]}: {given[0][1][:200]!r}"
        streamed, whole = (
            Answer.of_stream(given[0][1]).as_response()[1]["choices"][0],
            json.loads(given[1][1])["choices"][0],
        )
        differing += shown(streamed) != shown(whole)
        if whole["finish_reason"] == "length":
            looks_whole += sum(
                is_json(arguments) and json.loads(arguments) != ARGUMENTS
                for arguments in (call["function"]["arguments"] for call in calls_of(whole))
            )
    return not (differing or looks_whole), f"{differing} differ, {looks_whole} cut calls look whole"


def calls_of(choice: dict[str, Any]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = choice["message"].get("tool_calls") or []
    return calls


def shown(choice: dict[str, Any]) -> tuple[Any, ...]:
    """What a client gets of an answer."""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in calls_of(choice)]
    return choice["message"].get("content"), calls, choice["finish_reason"]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def under_load(
    server: Server, number: int, pid: int, requests: int = 32
) -> tuple[collections.Counter[str], float]:
    """Signals a process beside `requests` clients. How their answers ended, and seconds to the last."""

    def one(n: int) -> str:
        try:
            status, body = server.chat(max_tokens=1500, ignore_eos=True, stream=bool(n % 2))
        except TimeoutError:
            return "HUNG"
        except (OSError, http.client.HTTPException):
            return "closed"
        if status != 200:
            return str(status)
        return "error in the stream" if b'"error"' in body else "whole"

    with concurrent.futures.ThreadPoolExecutor(requests) as pool:
        jobs = [pool.submit(one, n) for n in range(requests)]
        time.sleep(2)
        began = time.monotonic()
        os.kill(pid, number)
        ends = collections.Counter(job.result() for job in jobs)
    return ends, time.monotonic() - began


def ending(
    options: argparse.Namespace, folder: Path, fault: str, server: Server | None = None
) -> tuple[bool, str]:
    """One way to end a server under load."""
    idle = options.gpu_idle
    server = server or Server(options, folder)
    used = gpu_mb()
    pids = server.processes()
    found, number = ENDS[fault]
    ends, seconds = under_load(server, number, found(server))
    code = server.process.wait(90)
    stayed = left(pids)
    told = ", ".join(f"{count} {how}" for how, count in sorted(ends.items()))
    memory = ""
    freed = True
    if used is not None and idle is not None:
        until = time.monotonic() + 30
        while (now := gpu_mb() or 0) > idle + 200 and time.monotonic() < until:
            time.sleep(0.5)
        freed = now <= idle + 200
        memory = f"; GPU {used:,} -> {now:,} MB"
    asked = fault in ("SIGTERM", "SIGHUP")
    right_code = code == 0 if asked else code != 0
    return (
        not ends["HUNG"] and not stayed and freed and right_code,
        f"{told} within {seconds:.0f} s; exit {code}, {len(stayed)} processes stayed{memory}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--vllm", required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory-share", type=float, default=0.3)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--hang-ups", type=int, default=100)
    parser.add_argument("--ends", default=",".join(ENDS), help="the ways to end the server")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.gpu_idle = gpu_mb()
    rows: list[tuple[str, int, bool, str]] = []

    def note(fault: str, times: int, result: tuple[bool, str]) -> None:
        rows.append((fault, times, *result))
        print(f"{'ok  ' if result[0] else 'FAIL'} {fault} x {times}: {result[1]}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(options, folder)
        print(
            f"vLLM {options.version} on {options.device}, {server.seconds:.0f} s from start to health",
            flush=True,
        )
        chance = random.Random(options.seed)
        note("bad requests", options.requests, bad_requests(server, options.requests, chance))
        note("clients that hang up", options.hang_ups, hang_ups(server, options.hang_ups, chance))
        note("tool calls cut by max_tokens, both ways", 30, cut_calls(server))
        first, *others = options.ends.split(",")
        note(f"{first} under load", 32, ending(options, folder, first, server))
        for fault in others:
            note(f"{fault} under load", 32, ending(options, folder, fault))
    print("\n| fault | times | what happened |\n|---|---|---|")
    for fault, times, fine, told in rows:
        print(f"| {fault} | {times} | {'' if fine else 'FAILED: '}{told} |")
    return 0 if all(fine for _, _, fine, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
