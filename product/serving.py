"""Serving what a recipe made, on this machine's loopback: through compose, or by a local vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge import plan
from forge.executor import Executor
from forge.executor.local import Local
from forge.finding import Refused, error
from forge.plan import Context
from product import PACKAGE, render

SERVICE = "vllm-nemotron-annie"
CHECK_SECONDS = 600
READY_SECONDS = 1800  # a 19 GB checkpoint from a cold disk, CUDA graphs included
_RECORD = "serving.json"


def serve(
    context: Context, executor: Executor, port: int = 8000, detach: bool = False, stop: bool = False
) -> int:
    """Starts (or stops) the server and returns the exit status. Refused if there is nothing to serve or it
    does not come up.
    """
    if executor.name == "docker":
        return _compose(context, port, detach, stop)
    if not isinstance(executor, Local):
        raise Refused(
            error("executor", executor.name, "docker or local, which can serve", "Name one of the two.")
        )
    return _local(context, executor, port, detach, stop)


def _compose(context: Context, port: int, detach: bool, stop: bool) -> int:
    compose = ["docker", "compose", "--project-directory", str(context.repo)]
    environment = {**os.environ, "ANNIE_PORT": str(port)}
    if stop:
        return subprocess.run([*compose, "down"], env=environment).returncode
    folder = plan.artifact(context, PACKAGE).folder
    tag = image_tag(folder)
    if not tag or subprocess.run(["docker", "image", "inspect", tag], capture_output=True).returncode:
        raise Refused(
            error(
                "serve",
                f"no image {tag or 'for this artifact'}",
                "the serving image in this engine",
                f"Make it: python build.py run --recipe {context.recipe.option} --executor docker --only"
                f" {PACKAGE} --force",
            )
        )
    write_override(context.repo, folder)
    if code := subprocess.run([*compose, "up", "--detach", SERVICE], env=environment).returncode:
        return code

    def state() -> str | None:
        """Why it cannot come up any more, if so."""
        running = subprocess.run(
            [*compose, "ps", "--quiet", "--status", "running", SERVICE],
            env=environment,
            capture_output=True,
            text=True,
        ).stdout.strip()
        return None if running else f"its container stopped; see: docker compose logs {SERVICE}"

    _record(context, folder, port)
    _wait(port, state)
    try:
        _check(port, folder)
    except Refused:
        subprocess.run([*compose, "down"], env=environment)
        raise
    print(f"serving {tag} on http://127.0.0.1:{port}")
    return (
        0
        if detach
        else subprocess.run(
            [*compose, "logs", "--follow", "--no-log-prefix", "--tail=0", SERVICE], env=environment
        ).returncode
    )


def image_tag(folder: Path) -> str:
    """The tag of the image that was built from a serving artifact; empty where no engine built one."""
    described = folder / "image.json"
    return str(json.loads(described.read_text())["tag"]) if described.exists() else ""


def point_compose_to_newest(context: Context) -> None:
    """Makes compose start the image that the newest run of this recipe built, if it built one."""
    if newest := context.store.newest(PACKAGE, context.recipe.name, context.executor):
        write_override(context.repo, newest.folder)


def write_override(repo: Path, folder: Path) -> None:
    """Writes compose.override.yaml, so that compose starts the image of the serving artifact in `folder`;
    does nothing where it has none.
    """
    if tag := image_tag(folder):
        device = json.loads((folder / "serve.json").read_text())["device"]
        render.write_override(repo, tag, device)


def _local(context: Context, executor: Local, port: int, detach: bool, stop: bool) -> int:
    if stop:
        return _stop(context.store.home)
    folder, step = plan.artifact(context, PACKAGE).folder, context.recipe.stages[PACKAGE]
    if not (product := step.contract.product):
        raise Refused(
            error(PACKAGE, "a stage without [build]", "what its image is made of", "See docs/formats.md.")
        )
    parts = product.folders(step.params, lambda name: plan.artifact(context, step.inputs[name]).folder)
    model = parts["checkpoint"]
    image = context.recipe.images["vllm"]
    executor.prepare(image, print)
    server = json.loads((folder / "serve.json").read_text())
    program = executor.environment(image) / "bin" / "vllm"
    command = [str(program), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *server["args"]]
    if parts["adapter"]:
        command += ["--lora-modules", f"{server['served_name']}={parts['adapter']}"]
    environment = {
        **os.environ,
        **server["env"],
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": os.pathsep.join([str(program.parent), os.environ.get("PATH", "")]),
    }
    log = context.store.home / "serving.log"
    with log.open("w") as opened:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=opened,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _record(context, folder, port, process.pid)
        _wait(
            port,
            lambda: None if process.poll() is None else f"vLLM ended with {process.returncode}; see {log}",
        )
        _check(port, folder)
        print(f"serving {model} on http://127.0.0.1:{port}" + ("" if detach else "; Ctrl-C stops it"))
        if detach:
            return 0
        return process.wait()
    except KeyboardInterrupt:
        _end(process.pid)
        return 130
    except BaseException:
        _end(process.pid)
        raise


def _wait(port: int, dead: Callable[[], str | None]) -> None:
    began = time.monotonic()
    while time.monotonic() - began < READY_SECONDS:
        if why := dead():
            raise Refused(error("serve", why, "a server that answers", "Its log says why."))
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except (OSError, urllib.error.URLError):
            time.sleep(1)
    raise Refused(
        error("serve", f"no answer after {READY_SECONDS} s", "a server that answers", "Its log says why.")
    )


def _check(port: int, folder: Path) -> None:
    """Asks what the base answers otherwise, so that nobody takes for tuned what is not. Refused if it
    answers as the base.
    """
    question, server = (json.loads((folder / name).read_text()) for name in ("check.json", "serve.json"))
    body = {
        "model": server["served_name"],
        "messages": question["messages"],
        "temperature": 0,
        "seed": 0,
        "max_tokens": question["max_tokens"],
        "chat_template_kwargs": server["chat_template_kwargs"],
        **({"tools": question["tools"]} if question["tools"] else {}),
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=CHECK_SECONDS) as response:
            answer = json.load(response)["choices"][0]["message"]
    except (OSError, ValueError, LookupError) as fault:
        raise Refused(
            error(
                "serve",
                f"a question of the evaluation got no answer: {fault}",
                "an answer",
                "The server's log says why.",
            )
        ) from fault
    calls = [
        {"function": {key: call["function"][key] for key in ("name", "arguments")}}
        for call in answer.get("tool_calls") or []
    ]
    if {"content": answer.get("content"), "tool_calls": calls} == question["base"]:
        raise Refused(
            error(
                "serve",
                f"it answers {_shortened(question['base'])} as the base does",
                f"the tuned model's answer: {_shortened(question['expected'])}",
                "What is served is not what was evaluated. Build it again: python build.py run --only"
                f" {PACKAGE} --force",
            )
        )
    print(
        f"it answers as the {server['serves']} model: {_shortened(answer)}"
        f" (the base: {_shortened(question['base'])})"
    )


def _shortened(answer: dict[str, Any]) -> str:
    """An answer in a few words."""
    calls = [f"{call['function']['name']}(...)" for call in answer.get("tool_calls") or []]
    text = " ".join([*(answer.get("content") or "").split(), *calls])
    return json.dumps(text if len(text) <= 60 else f"{text[:57]}...", ensure_ascii=False)


def _record(context: Context, folder: Path, port: int, pid: int | None = None) -> None:
    (context.store.home / _RECORD).write_text(
        json.dumps({"folder": str(folder), "port": port, "pid": pid}) + "\n"
    )


def _stop(home: Path) -> int:
    record_file = home / _RECORD
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    pid = record.get("pid")
    command = Path(f"/proc/{pid}/cmdline")
    if not pid or not command.exists() or b"vllm" not in command.read_bytes():
        print("nothing is being served from here")
        return 0
    _end(pid)
    record_file.unlink()
    print("stopped")
    return 0


def _end(pid: int) -> None:
    """Ends the server's whole process group: its engine is a process of its own."""
    for number, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        try:
            os.killpg(pid, number)
            for _ in range(seconds * 10):
                os.killpg(pid, 0)
                _reap(pid)
                time.sleep(0.1)
        except ProcessLookupError:
            return


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:  # another process started it
        return


def served_artifact(home: Path) -> Path:
    """The serving artifact that a chat belongs to: what `serve` started last, else the newest one. Refused
    if there is none.
    """
    record = home / _RECORD
    if record.exists() and (folder := Path(json.loads(record.read_text())["folder"])).is_dir():
        return folder
    prompts = sorted(
        (home / "store" / "artifacts" / PACKAGE).glob("*/prompt.txt"), key=lambda path: path.stat().st_mtime
    )
    if not prompts:
        raise Refused(
            error("chat", f"no serving artifact in {home}", "one", "Build it: make model, or make demo.")
        )
    return prompts[-1].parent
