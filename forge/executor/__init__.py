"""Where stages run. Five calls: prepare an environment, submit a task, poll it, read its logs, cancel it.
A sixth, `bake`, is for executors whose stages have images of their own. `out_of_memory`, `neighbours` and
`end_orphans` are for those whose stages have limits of memory and outlive a killed forge.

And `command` is for what only reads and answers on stdout: it takes no lock, leaves nothing, and no
run notices it.
"""

from __future__ import annotations

import datetime
import importlib
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol, runtime_checkable

from forge.executors import EXECUTORS
from forge.finding import Finding, Refused, error
from forge.image import Image
from forge.program import Program


@dataclass(frozen=True)
class Task:
    """One run of one stage, under the name `stage`. `job` holds the host's paths; the files
    `<folder>/<prefix>.{json,sh}` are written by `submit`. `memory_gb` and `pids` (processes and threads) are
    what the stage may take at most.
    """

    stage: str
    program: Program
    job: dict[str, Any]
    folder: Path
    prefix: str
    gpu: bool = False
    network: bool = False
    memory_gb: float = 1.0
    pids: int = 4096


KERNELS = "ANNIE_KERNELS"  # tells a stage where compiled kernels stay (model/layers/kernel_cache.py)

# Seconds that a cancelled stage has after SIGTERM: stage train ends its step and saves a checkpoint.
GRACE = 60

# oom_score_adj of a stage: where the machine's memory runs out the kernel kills the stage, and not the server
# or the user's session. On a GB10 no limit of a container counts what CUDA takes, so this is what is left.
FIRST_TO_GO = 1000


def kernel_folder(home: Path, image: Image, fingerprint: str) -> Path:
    """Where kernels stay that the stages of an image compile. In no key: with other kernels, or none, a
    stage makes the same artifact.
    """
    return home / "kernels" / f"{image.name}-{fingerprint}"


@dataclass(frozen=True)
class Neighbour:
    """A container of ours that runs beside a stage. `memory_gb` is the most that it may take. `orphan`: a
    killed run left it, and the next run ends it first.
    """

    container: str
    what: str
    memory_gb: float
    orphan: bool = False


@dataclass(frozen=True)
class Line:
    stream: Literal["stdout", "stderr"]
    text: str


class Executor(Protocol):
    """`scratch`: a task's scratch folder as the stage sees it; empty where that is the host's path."""

    name: str
    scratch: str

    def check(self, environments: list[Image], gpu: bool) -> list[Finding]:
        """What this machine lacks for these images."""

    def prepare(self, image: Image, on_line: Callable[[str], None]) -> None:
        """Makes the environment; does nothing if it is there. Refused if it cannot be made."""

    def bake(self, program: Program, on_line: Callable[[str], None]) -> None:
        """Makes the image of a stage, on its environment, which is prepared; does nothing if it is there, or
        where stages run from the repository's files. Refused if it cannot be made.
        """

    def submit(self, task: Task) -> Any:
        """Starts a task and returns a handle for the other calls."""

    def poll(self, running: Any) -> int | None:
        """Exit status, or None while it runs."""

    def logs(self, running: Any) -> Iterator[Line]:
        """Its lines as they come; ends when the task has ended."""

    def out_of_memory(self, running: Any) -> bool:
        """Whether the kernel killed a process of a task that has ended, at the task's limit of memory."""

    def cancel(self, running: Any) -> None:
        """Ends the task and everything it started: SIGTERM first, and SIGKILL after GRACE seconds or at
        once when it is interrupted by another Ctrl-C.
        """

    def neighbours(self) -> list[Neighbour]:
        """The stages of any store and the served models that run here in containers with a limit."""

    def end_orphans(self) -> None:
        """Ends what a killed run of this store left running. For the holder of the store's lock."""

    def kernels(self, task: Task) -> Path | None:
        """The folder, on this machine, where kernels stay that `task` compiles; None for a task without a
        GPU, which compiles none.
        """

    def command(self, program: Program, arguments: list[str | Path]) -> list[str]:
        """A command that runs the program, which is baked. A Path among `arguments` is a
        folder that it may read.
        """


@runtime_checkable
class ProductBuilder(Protocol):
    """An executor that also builds the serving image."""

    def build_product(
        self,
        image: Image,
        environment: Image,
        contexts: dict[str, Path | None],
        output: Path,
        tag: str,
        labels: dict[str, str],
        on_line: Callable[[str], None],
    ) -> None:
        """Builds it from `output` on `environment`, which is prepared, calls it `tag` (REPOSITORY:VERSION)
        and also REPOSITORY:latest, and writes output/image.json. A context of None is empty.
        """


@dataclass(frozen=True)
class KeptImage:
    """An image that an executor made, by one of its tags, or by its id if it has none. `key`: of the artifact
    that it was built from, if of one.
    """

    tag: str
    bytes: int
    created: datetime.datetime
    key: str = ""


@runtime_checkable
class ImageKeeper(Protocol):
    """An executor whose images stay in an engine."""

    def kept(self) -> list[KeptImage]:
        """Every image that forge made there, by each of its tags."""

    def tags(self, environments: list[Image], programs: list[Program]) -> list[str]:
        """What the images of these environments and programs are called."""

    def remove(self, tag: str) -> Finding | None:
        """Removes an image; why not, if it is still used."""


def make(name: str | None, repo: Path, home: Path) -> Executor:
    """The executor called `name`; without a name docker where an engine answers, else local."""
    if name is None:
        from forge.executor.engine import answers

        name = "docker" if answers() else "local"
    if name not in EXECUTORS:
        raise Refused(
            error(
                "executor",
                f"no executor {name}",
                " or ".join(EXECUTORS),
                "Name one of these with --executor.",
            )
        )
    module, _, class_name = EXECUTORS[name].place.partition(":")
    executor: Executor = getattr(importlib.import_module(module), class_name)(repo, home)
    return executor


def run_logged(
    command: list[str], on_line: Callable[[str], None], subject: str, remedy: str, **options: Any
) -> None:
    """Runs a command to its end, each line of its output to `on_line`. Refused, with its last words, if it
    fails. It outlives the terminal, as the run does that it is part of.
    """
    last: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        **options,
    ) as process:
        assert process.stdout
        for text in process.stdout:
            if text := text.rstrip():
                on_line(text)
                last = [*last[-7:], text]
    if process.returncode:
        raise Refused(
            error(
                subject,
                f"{' '.join(command[:4])} ... ended with {process.returncode}: {' | '.join(last)}",
                "exit status 0",
                remedy,
            )
        )


def merged(streams: dict[Literal["stdout", "stderr"], IO[str]]) -> Iterator[Line]:
    """Lines of several pipes in the order in which they come."""
    lines: queue.Queue[Line | None] = queue.Queue()

    def read(name: Literal["stdout", "stderr"], stream: IO[str]) -> None:
        for text in stream:
            lines.put(Line(name, text.rstrip("\n")))
        lines.put(None)

    for name, stream in streams.items():
        threading.Thread(target=read, args=(name, stream), daemon=True).start()
    open_ = len(streams)
    while open_:
        line = lines.get()
        if line is None:
            open_ -= 1
        else:
            yield line
