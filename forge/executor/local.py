"""Stages as processes of this machine, each in a virtual environment made from its image's locked requirements."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from forge import image as images
from forge import render
from forge.executor import Line, Task, merged, run_logged
from forge.finding import Finding, error
from forge.image import Image

# PyTorch's own index of CPU builds; a folder of wheels (ANNIE_WHEELS) goes before it.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
_PASSED_ON = ("LANG", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "HF_ENDPOINT")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[str]


class Local:
    name = "local"

    def __init__(self, repo: Path, home: Path):
        self.repo, self.home = repo, home

    def environment(self, image: Image) -> Path:
        return self.home / "envs" / f"{image.name}-{images.fingerprint(image, self.name)}"

    def python(self, image: Image) -> Path:
        return self.environment(image) / "bin" / "python"

    def interpreter(self, image: Image) -> Path:
        """The environment's python; this one for an image without locked requirements."""
        return self.python(image) if self.ready(image) else Path(sys.executable)

    def check(self, wanted: list[Image], gpu: bool) -> list[Finding]:
        found = []
        if gpu:
            found.append(error("executor", "the local executor, whose environments hold CPU builds", "docker for a recipe with a GPU", "Run with --executor docker."))
        locked = sys.version_info[:2] == (3, 11) and os.uname().machine == "x86_64"
        if not locked and any(not self.ready(image) for image in wanted):
            found.append(error(
                "python", f"Python {sys.version_info.major}.{sys.version_info.minor} on {os.uname().machine}", "Python 3.11 on x86_64, for which images/torch.lock holds a CPU build of torch",
                "Make .venv with that Python (make PYTHON=python3.11), or run with --executor docker."))
        return found

    def ready(self, image: Image) -> bool:
        return (self.environment(image) / ".ready").exists()

    def prepare(self, image: Image, on_line: Callable[[str], None]) -> None:
        """Makes the environment beside its place and marks it ready last, so that a half-made one is never used."""
        if self.ready(image) or not (image.folder / "requirements.lock").exists():
            return
        target = self.environment(image)
        shutil.rmtree(target, ignore_errors=True)
        uv = [sys.executable, "-m", "uv"]
        python = str(target / "bin" / "python")
        install = [*uv, "pip", "install", "--python", python, "--no-deps", "--require-hashes", "--compile-bytecode"]
        remedy = "Most often the network or the disk; run again, what was downloaded is kept."
        environment = {**os.environ, "UV_LINK_MODE": os.environ.get("UV_LINK_MODE", "hardlink"), "UV_HTTP_TIMEOUT": "180"}
        environment.pop("VIRTUAL_ENV", None)

        def step(command: list[str]) -> None:
            run_logged(command, on_line, f"environment {image.name}", remedy, env=environment)

        step([*uv, "venv", "--python", sys.executable, str(target)])
        step([*install, "-r", str(image.folder / "requirements.lock")])
        step([*install, *torch_source(), "-r", str(image.folder.parent / "torch.lock")])
        step([python, str(image.folder.parent / "apply_patches.py"), str(image.folder / "patches")])
        if (image.folder / "install.py").exists():
            step([python, str(image.folder / "install.py")])
        (target / ".ready").touch()

    def submit(self, task: Task) -> Running:
        job = task.folder / f"{task.prefix}.json"
        job.write_text(json.dumps(task.job, indent=1) + "\n")
        home = Path(task.job["scratch"]) / "home"
        home.mkdir(parents=True, exist_ok=True)
        python = self.interpreter(task.image)
        command = [str(python), "-m", f"stages.{task.stage}", str(job)]
        environment = {
            **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            "PATH": os.pathsep.join([str(python.parent), "/usr/local/bin", "/usr/bin", "/bin"]),
            "HOME": str(home),
            "PYTHONPATH": str(task.repo),
            **stage_environment(task.network),
        }
        render.write_script(task.folder / f"{task.prefix}.sh", task.stage, "Its output goes where the job says.", [
            ["cd", str(task.repo)],
            ["mkdir", "-p", task.job["output"], str(home)],
            ["exec", "env", "-i", *(f"{k}={v}" for k, v in environment.items()), *command],
        ])
        process = subprocess.Popen(
            command, cwd=task.repo, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True, preexec_fn=_die_with_parent,
        )
        return Running(process)

    def poll(self, running: Running) -> int | None:
        return running.process.poll()

    def logs(self, running: Running) -> Iterator[Line]:
        assert running.process.stdout and running.process.stderr
        yield from merged({"stdout": running.process.stdout, "stderr": running.process.stderr})
        running.process.wait()

    def cancel(self, running: Running) -> None:
        """SIGTERM to the whole process group, SIGKILL to what is left of it after ten seconds."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(running.process.pid, number)
                running.process.wait(10)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def command(self, image: Image, module: str, arguments: list[str | Path]) -> list[str]:
        # Without PYTHONSAFEPATH -m looks first in the caller's folder, which may be another clone.
        environment = {"PYTHONPATH": str(self.repo), "PYTHONSAFEPATH": "1", **stage_environment(network=False)}
        return ["env", "-i", *(f"{k}={v}" for k, v in environment.items()), str(self.interpreter(image)), "-m", module, *map(str, arguments)]


def stage_environment(network: bool) -> dict[str, str]:
    """What a stage's process gets in every executor: no telemetry, no downloads it did not ask for, the same hashes every time."""
    return {
        "HF_HUB_OFFLINE": "0" if network else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
    }


def torch_source() -> list[str]:
    """Where torch comes from: a folder of wheels if one is named, else PyTorch's own CPU index."""
    folder = os.environ.get("ANNIE_WHEELS") or os.environ.get("PIP_FIND_LINKS")
    if folder:
        return ["--no-index", "--find-links", folder]
    return ["--index-url", TORCH_INDEX]


def _die_with_parent() -> None:
    """A stage must not outlive a forge that was killed: the kernel ends it then (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
