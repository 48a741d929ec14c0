"""Stages as processes of this machine, each in a virtual environment made from its image's locked
requirements.
"""

from __future__ import annotations

import contextlib
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
from forge import modes, render
from forge.executor import (
    FIRST_TO_GO,
    GRACE,
    KERNELS,
    Line,
    Neighbour,
    Task,
    kernel_folder,
    merged,
    run_logged,
)
from forge.executor.uv import Uv
from forge.finding import Finding, Refused, error
from forge.image import Image
from forge.program import Program

_PASSED_ON = (
    "LANG",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
)
# Only for stages that ask for the network: a proxy's address may hold a password. curl reads the lower-case
# names alone.
_NETWORK = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy", "HF_ENDPOINT")
# torch's and its libraries' own limits on the instructions that they use: to see what another CPU would
# compute (`make long`).
_INSTRUCTIONS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
# How often a thread of GNU OpenMP looks for work before it sleeps. By default it spins on, which slows a busy
# machine; sleeping at once (OMP_WAIT_POLICY=PASSIVE) slows an idle one. bench/busy.py compares them;
# docs/performance.md has the figures.
SPIN_COUNT = "30000"
# torch for aarch64 is a CUDA build: on a DGX Spark it would see the GPU that this executor's environments
# lack the kernels for.
_NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[str]


class Local:
    name = "local"
    scratch = ""

    def __init__(self, repo: Path, home: Path, machine: str | None = None, uv: Uv | None = None):
        """`machine` is a type of machine as `uname -m` says it (this one's by default)."""
        self.repo, self.home = repo, home
        self.machine, self.uv = images.machine_type(machine), uv or Uv()

    def environment(self, image: Image) -> Path:
        return self.home / "envs" / f"{image.name}-{images.fingerprint(image, self.name, self.machine)}"

    def python(self, image: Image) -> Path:
        return self.environment(image) / "bin" / "python"

    def interpreter(self, image: Image) -> Path:
        """The environment's python; this one for an image without locked requirements."""
        return self.python(image) if self.ready(image) else Path(sys.executable)

    def check(self, environments: list[Image], gpu: bool) -> list[Finding]:
        findings = []
        if gpu:
            findings.append(
                error(
                    "executor",
                    "the local executor, whose environments hold CPU builds",
                    "docker for a recipe with a GPU",
                    "Run with --executor docker.",
                )
            )
        missing = [image for image in environments if _locked(image) and not self.ready(image)]
        return findings + [
            finding
            for folder in {image.folder.parent for image in missing}
            for finding in self._python_findings(folder)
        ]

    def _python_findings(self, folder: Path) -> list[Finding]:
        """Why the environments of the images in `folder` cannot be made with any Python of this machine,
        or with one that uv fetches.
        """
        pythons = images.pythons(folder)
        if self.machine not in pythons:
            return [
                error(
                    "machine",
                    f"a machine of type {self.machine}",
                    f"{' or '.join(pythons)}, for which images/torch-*.lock hold torch",
                )
            ]
        version = pythons[self.machine]
        if self.uv.find(version) or (unreachable := self.uv.unreachable(version)) is None:
            return []
        return [
            error(
                "python",
                f"{_listed(self.uv.installed())}, and uv cannot fetch another ({unreachable})",
                f"Python {version}, for which images/torch-{self.machine}.lock holds torch",
                f"Run {' '.join(self.uv.command)} python install {version} where there is a network, or"
                f" install it with this system's packages (apt install python{version}), or run with"
                " --executor docker.",
            )
        ]

    def ready(self, image: Image) -> bool:
        """Whether the environment is whole, and still where it was made: the first lines of its programs
        name its folder.
        """
        target = self.environment(image).resolve()
        stamp = target / ".ready"
        return (
            stamp.is_file()
            and stamp.read_text().strip() == str(target)
            and (target / "bin" / "python").exists()
        )

    def prepare(self, image: Image, on_line: Callable[[str], None]) -> None:
        """Makes the environment beside its place and marks it ready last, so that a half-made one is never
        used.
        """
        if self.ready(image) or not _locked(image):
            return
        folder = image.folder.parent
        if findings := self._python_findings(folder):
            raise Refused(findings)
        target = self.environment(image).resolve()
        shutil.rmtree(target, ignore_errors=True)
        uv = self.uv.command
        python = str(target / "bin" / "python")
        install = [*uv, "pip", "install", "--python", python, "--no-deps", "--require-hashes"]
        remedy = "Most often the network or the disk; run again, what was downloaded is kept."
        environment = {
            **os.environ,
            "UV_LINK_MODE": os.environ.get("UV_LINK_MODE", "hardlink"),
            "UV_HTTP_TIMEOUT": "180",
            "UV_COMPILE_BYTECODE": "1",
        }
        environment.pop("VIRTUAL_ENV", None)

        def step(command: list[str]) -> None:
            run_logged(command, on_line, f"environment {image.name}", remedy, env=environment)

        step(
            [
                *uv,
                "venv",
                "--no-project",
                "--python",
                f"cpython-{images.pythons(folder)[self.machine]}",
                str(target),
            ]
        )
        step([*install, "-r", str(image.folder / "requirements.lock")])
        step([python, str(folder / "install_torch.py"), *uv])
        step([python, str(folder / "apply_patches.py"), str(image.folder / "patches")])
        if (image.folder / "install.py").exists():
            step([python, str(image.folder / "install.py")])
        os.sync()  # what the steps above wrote, and what uv linked from its cache
        modes.write(target / ".ready", f"{target}\n")

    def bake(self, program: Program, on_line: Callable[[str], None]) -> None:
        """Nothing: stages run from the repository's own files."""

    def submit(self, task: Task) -> Running:
        job = task.folder / f"{task.prefix}.json"
        modes.write(job, json.dumps(task.job, indent=1) + "\n")
        home = modes.make_folder(Path(task.job["scratch"]) / "home")
        python = self.interpreter(task.program.environment)
        command = [str(python), "-m", task.program.module, str(job)]
        environment = {
            **process_environment(python, home, task.network),
            "PYTHONPATH": str(task.program.repo),
        }
        folders = [task.job["output"], str(home)]
        if kernels := self.kernels(task):
            modes.make_folder(kernels)
            environment[KERNELS] = str(kernels)
            folders.append(str(kernels))
        render.write_script(
            task.folder / f"{task.prefix}.sh",
            task.stage,
            "Its output goes where the job says.",
            [
                ["cd", str(task.program.repo)],
                ["mkdir", "-p", *folders],
                ["exec", "env", "-i", *(f"{k}={v}" for k, v in environment.items()), *command],
            ],
        )
        process = subprocess.Popen(
            command,
            cwd=task.program.repo,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            umask=modes.umask(),
            preexec_fn=_become_stage,
        )
        return Running(process)

    def poll(self, running: Running) -> int | None:
        return running.process.poll()

    def logs(self, running: Running) -> Iterator[Line]:
        assert running.process.stdout and running.process.stderr
        yield from merged({"stdout": running.process.stdout, "stderr": running.process.stderr})
        running.process.wait()

    def out_of_memory(self, running: Running) -> bool:
        """Never: a process has no limit of memory here. RLIMIT_AS would count what torch only reserves, and
        a cgroup needs rights that a user may lack.
        """
        return False

    def cancel(self, running: Running) -> None:
        """Signals go to the whole process group, SIGKILL also to what is left of it after the stage."""
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(running.process.pid, signal.SIGTERM)
                running.process.wait(GRACE)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                pass  # it is killed, and nobody waits any longer
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait(10)

    def neighbours(self) -> list[Neighbour]:
        """None: processes have no limits; what they hold is not available."""
        return []

    def end_orphans(self) -> None:
        """Nothing: a stage ends with the process that started it."""

    def kernels(self, task: Task) -> Path | None:
        environment = task.program.environment
        fingerprint = images.fingerprint(environment, self.name, self.machine)
        return kernel_folder(self.home, environment, fingerprint) if task.gpu else None

    def server_environment(self, image: Image) -> dict[str, str]:
        """What a server on the environment of `image` gets; its caches stay in the home folder."""
        home = self.home / "serving-home"
        home.mkdir(parents=True, exist_ok=True)
        return process_environment(self.interpreter(image), home, network=False)

    def command(self, program: Program, arguments: list[str | Path]) -> list[str]:
        # Without PYTHONSAFEPATH -m looks first in the caller's folder, which may be another clone.
        environment = {
            "PYTHONPATH": str(program.repo),
            "PYTHONSAFEPATH": "1",
            **_NO_GPU,
            **stage_environment(network=False),
        }
        return [
            "env",
            "-i",
            *(f"{k}={v}" for k, v in environment.items()),
            str(self.interpreter(program.environment)),
            "-m",
            program.module,
            *map(str, arguments),
        ]


def process_environment(python: Path, home: Path, network: bool) -> dict[str, str]:
    """The whole environment of a process that `python` runs. Nothing else of the caller's gets in: no
    token, no key.
    """
    names = (*_PASSED_ON, *_INSTRUCTIONS, *(_NETWORK if network else ()))
    return {
        **{name: os.environ[name] for name in names if name in os.environ},
        "PATH": os.pathsep.join([str(python.parent), "/usr/local/bin", "/usr/bin", "/bin"]),
        "HOME": str(home),
        **_NO_GPU,
        **stage_environment(network),
    }


def stage_environment(network: bool) -> dict[str, str]:
    """What a stage's process gets in every executor: no telemetry, no downloads it did not ask for, the
    same hashes every time.
    """
    return {
        "GOMP_SPINCOUNT": SPIN_COUNT,
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


def _locked(image: Image) -> bool:
    """Whether the image has an environment of its own."""
    return (image.folder / "requirements.lock").exists()


def _listed(installed: list[str]) -> str:
    return "no Python" if not installed else f"Python {', '.join(installed)}"


def _become_stage() -> None:
    end_with_parent()
    with contextlib.suppress(OSError):  # a sandbox whose /proc is read-only: then it is as likely as others
        Path("/proc/self/oom_score_adj").write_text(str(FIRST_TO_GO))


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """In a process before its program starts: the kernel sends it a signal when the process that started it
    is gone, however that ended (Linux).
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
