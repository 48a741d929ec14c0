"""Starts vLLM with the flags of serve.json, and ends when it ends.

    python supervisor.py [ARGUMENTS OF vllm serve]
    python supervisor.py --healthy

The first process of the serving container, and what `build.py serve` starts without one. Settings come from
the environment:

| variable | meaning | default |
|---|---|---|
| ANNIE_SERVING | the folder with serve.json | the artifact that this file is part of |
| ANNIE_MODEL, ANNIE_ADAPTER | the checkpoint, and an adapter that is added at run time | /model, /adapter |
| ANNIE_HOST, ANNIE_PORT | the address to listen on | 0.0.0.0, port of serve.json |
| ANNIE_BIND | the address that clients reach it under, where it is another (a published port) | ANNIE_HOST |
| ANNIE_API_KEY_FILE | a file with the key that clients must send | /run/secrets/annie_api_key if there |
| ANNIE_SERVER | the name by which its starter knows it again | empty |
| ANNIE_ORIGIN | what is served, in words; the first line that is printed | empty |
| ANNIE_VLLM | the vllm program | vllm |

vLLM's engine and workers are processes of their own, which outlive an API server that dies. All of them are
in one session here, and this process adopts those that lose their parent. It ends them, and then itself:
with status 0 if it was asked to, otherwise with vLLM's status or 1. So a container restarts, and a GPU is
free again.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]  # vLLM imports the front from there
SECRET = Path("/run/secrets/annie_api_key")
SHORTEST_KEY = 16  # characters
GRACE = 20.0  # seconds for answers under way after SIGTERM
TEARDOWN = 15.0  # more seconds for vLLM to end by itself
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class Unfit(Exception):
    """Settings that cannot be served with."""


def main(arguments: list[str]) -> int:
    """The exit status."""
    folder = Path(os.environ.get("ANNIE_SERVING", ROOT.parent))
    serve = json.loads((folder / "serve.json").read_text())
    try:
        key = api_key()
        if arguments == ["--healthy"]:
            return 0 if healthy(port(serve), key) else 1
        if not key and not is_loopback(os.environ.get("ANNIE_BIND") or host()):
            raise Unfit(
                "found no key for a server that other machines reach; expected one. Put it into a file that"
                " ANNIE_API_KEY_FILE names, or publish the port on 127.0.0.1 alone and say so with"
                " ANNIE_BIND=127.0.0.1."
            )
    except Unfit as unfit:
        print(f"serve: {unfit}", file=sys.stderr)
        return 2
    if origin := os.environ.get("ANNIE_ORIGIN"):
        print(f"serve: {origin}", flush=True)
    return supervise(command(serve, arguments), environment(serve, folder, key))


def host() -> str:
    return os.environ.get("ANNIE_HOST", "0.0.0.0")


def port(serve: dict[str, Any]) -> int:
    return int(os.environ.get("ANNIE_PORT", serve["port"]))


def api_key() -> str:
    """The key, empty where none is asked. Unfit if its file cannot be read or holds too little."""
    named = os.environ.get("ANNIE_API_KEY_FILE", "")
    path = Path(named or SECRET)
    if not named and not path.exists():
        return ""
    try:
        key = path.read_text().strip()
    except (OSError, ValueError) as fault:
        raise Unfit(f"found no readable key in {path} ({fault}); expected one line of text.") from fault
    if not key and not named:
        return ""  # compose mounts an empty file where no key is set
    if len(key) < SHORTEST_KEY or not key.isascii() or any(c.isspace() for c in key):
        raise Unfit(
            f"found a key of {len(key)} characters in {path}; expected {SHORTEST_KEY} or more, ASCII, no"
            " blanks. Make one: openssl rand -hex 32."
        )
    return key


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return address == "localhost"


def healthy(at_port: int, key: str) -> bool:
    """Whether the server answers. Never through a proxy: one could answer for it."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"http://127.0.0.1:{at_port}/health", headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(request, timeout=4).close()
    except OSError:
        return False
    return True


def command(serve: dict[str, Any], arguments: list[str]) -> list[str]:
    adapter = os.environ.get("ANNIE_ADAPTER", "/adapter")
    modules = ["--lora-modules", f"{serve['served_name']}={adapter}"] if serve["serves"] == "tuned" else []
    return [
        os.environ.get("ANNIE_VLLM", "vllm"),
        "serve",
        os.environ.get("ANNIE_MODEL", "/model"),
        "--host",
        host(),
        "--port",
        str(port(serve)),
        "--middleware",
        "stages.serving.front.Front",
        *serve["args"],
        *modules,
        *arguments,
    ]


def environment(serve: dict[str, Any], folder: Path, key: str) -> dict[str, str]:
    """vLLM's: this one's, what serve.json adds, and the front's settings. The key itself is not in it.
    `folder` holds serve.json and the file of the prompt.
    """
    front = {
        "server": os.environ.get("ANNIE_SERVER", ""),
        "key_sha256": hashlib.sha256(key.encode()).hexdigest() if key else "",
        "grace": GRACE,
        **serve["front"],
    }
    if prompt := front.get("default_prompt"):
        front["default_prompt"] = str(folder.absolute() / prompt)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **serve["env"], "ANNIE_FRONT": json.dumps(front), "PYTHONPATH": path}


def supervise(words: list[str], variables: dict[str, str]) -> int:
    """Runs vLLM to its end and leaves no process of it behind. The exit status."""
    os.makedirs(variables["HOME"], exist_ok=True)
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    process = subprocess.Popen(
        words,
        env=variables,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        # If this process is killed, vLLM ends as if it had been asked to, and ends its engine.
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
    )
    deadline = float("inf")
    while not ended(process):
        if asked and deadline == float("inf"):
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + GRACE + TEARDOWN
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    end_session(process)
    if asked:
        return 0
    code = process.returncode or 1
    print(f"serve: vLLM ended by itself with {process.returncode}; its last lines say why", file=sys.stderr)
    return code if code > 0 else 128 - code


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether vLLM has ended. Also takes leave of adopted processes, which are no children of vLLM's."""
    if process.poll() is not None:
        return True
    with contextlib.suppress(ChildProcessError):
        for child in children():
            if child != process.pid:
                os.waitpid(child, os.WNOHANG)
    return False


def children() -> list[int]:
    """The processes whose parent this one is."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(word) for word in text.split()]


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of vLLM's session and of what was adopted, until nothing is."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while left := children():
        for child in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
