"""A vLLM server for the duration of an evaluation: it is started, waited for, asked, and always stopped.

If it fails, the error names the cause that the server's log gives (stages/evaluate/server_log.py). The whole
log goes to the stage's log.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

from model.families.serve import Serve
from stages import job
from stages.evaluate import server_log
from stages.job import StageError
from stages.serving.front import SERVER_HEADER, VARIABLE, Settings
from stages.serving.tool_calls import Answer

START_SECONDS = 1800  # enough for a 19 GB checkpoint from a cold disk, CUDA graphs included
ANSWER_SECONDS = 600
STOP_SECONDS = 15
KEPT = 400  # last lines of the log that are searched for the cause; two tracebacks of vLLM fit
SHOWN = 5  # last lines that an error shows if they name no cause
MEMINFO = Path("/proc/meminfo")
ROOT = Path(__file__).resolve().parents[2]
FRONT = "stages.serving.front.Front"
# Held-out conversations are private: they go to the server on this machine and through no proxy.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """`with Server(folder, serve, "base") as server: server.ask(...)`. The server's log goes to stderr.

    Clients reach vLLM through the same front as in production (stages/serving/front.py).
    """

    def __init__(
        self, model: Path, serve: Serve, label: str, adapter: Path | None = None, questions: int = 16
    ):
        """`questions` are asked at the same time at most."""
        self.label = label
        self.port = _free_port()
        program = shutil.which(
            "vllm", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        )
        if not program:
            raise StageError("no vllm command in this image", "an image with vLLM", "Check images/vllm.")
        self.front = Settings(f"evaluate-{secrets.token_hex(8)}", running=questions, waiting=questions)
        self.command = [
            program,
            "serve",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--middleware",
            FRONT,
            *serve.args,
        ]
        if adapter:
            self.command += ["--lora-modules", f"tuned={adapter}"]
        # vLLM imports the front by its name, from this repository's files.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        self.env = {**os.environ, **serve.env, "PYTHONPATH": path, VARIABLE: self.front.as_variable()}
        self.last: deque[str] = deque(maxlen=KEPT)

    def __enter__(self) -> Server:
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            self.command,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        self.reader = threading.Thread(target=self._copy_log, daemon=True)
        self.reader.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop_group()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_group()

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """One chat completion. Raises StageError with the cause from the server's log if it cannot answer."""
        answer: dict[str, Any] = json.loads(self._post(body))
        return answer

    def ask_streamed(self, body: dict[str, Any]) -> dict[str, Any]:
        """The same as a client that streams gets it, put together. Raises StageError as `ask` does."""
        status, answer = Answer.of_stream(self._post({**body, "stream": True})).as_response()
        if status != 200:
            raise StageError(f"vLLM ended a stream early ({answer})", "an answer", "See the server's log.")
        return answer

    def _post(self, body: dict[str, Any]) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with DIRECT.open(request, timeout=ANSWER_SECONDS) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError as error:
            raise StageError(
                f"vLLM refused a question ({error.code}): {error.read().decode(errors='replace')[:500]}",
                "an answer",
                "The log has the server's side.",
            ) from error
        except OSError as error:
            raise self._failure(f"vLLM did not answer about {self.label}", error) from error

    def _wait_until_ready(self) -> None:
        while time.monotonic() - self.began < START_SECONDS:
            if self.process.poll() is not None:
                raise self._failure(f"vLLM ended with {self.process.returncode} while it loaded {self.label}")
            try:
                with DIRECT.open(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                    server = answer.headers.get(SERVER_HEADER.decode(), "")
                if server == self.front.server:
                    return
                raise StageError(
                    f"another program answers on port {self.port}",
                    "the vLLM that was just started",
                    "Run again: it takes another free port.",
                )
            except OSError:
                job.progress(0, None, "question", f"{self.label}: vLLM is loading")
                time.sleep(1)
        raise self._failure(f"vLLM was not ready after {START_SECONDS} s")

    def _failure(self, found: str, error: OSError | None = None) -> StageError:
        """The error for a server that failed: the cause from its log, or else its last lines."""
        try:  # after it closed the connection, the process may need a moment to write the cause and to end
            self.process.wait(2)
            self.reader.join(2)
        except subprocess.TimeoutExpired:
            pass
        code = self.process.poll()
        if cause := server_log.cause(list(self.last), code, _available_gb()):
            return StageError(
                f"{found}: {cause.text}",
                "a server that answers",
                cause.remedy or "Look that message up in vLLM's issues.",
            )
        ending = "\n".join(list(self.last)[-SHOWN:])
        return StageError(
            f"{found}{f': {error}' if error else ''}. Its last lines:\n{ending}",
            "a server that answers",
            "See the whole log.",
        )

    def _copy_log(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.last.append(line.rstrip())
            sys.stderr.write(line)

    def _stop_group(self) -> None:
        """Asks the API server to stop, which ends its engine and workers. Kills what is left of the group."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reader.join(5)


def _available_gb() -> float | None:
    """GB of memory that a new program could take; None if the system does not tell (not Linux)."""
    if not MEMINFO.exists():
        return None
    kilobytes = re.search(r"^MemAvailable: +(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
    return int(kilobytes[1]) * 1024 / 1e9 if kilobytes else None


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def _die_with_parent() -> None:
    """Makes the kernel stop the server if the stage is killed (Linux's PR_SET_PDEATHSIG). With SIGTERM, after
    which the server ends its engine too.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
