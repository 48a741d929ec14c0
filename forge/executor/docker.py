"""Stages as containers: run through Docker's API, built by BuildKit through the docker command line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound

from forge import VERSION, lock, modes, render
from forge import image as images
from forge.executor import GRACE, KERNELS, KeptImage, Line, Neighbour, Task, kept, kernel_folder, run_logged
from forge.executor.container import SCRATCH, ContainerSpec, container_job
from forge.executor.engine import (
    gpu_findings,
    machine_findings,
    neighbours,
    no_engine,
    plugin_findings,
    unanswered,
)
from forge.executor.local import stage_environment
from forge.finding import Finding, Refused, error
from forge.image import Image
from forge.plan import GB
from forge.program import Program
from forge.report import size

REPOSITORY = "annie"
# the same in every container: Triton writes the absolute path of what it compiled beside it
KERNELS_INSIDE = "/kernels"
_STAGE = "io.annie.stage"  # label, of stages' images and containers
_OWNER = "io.annie.home"  # label: the store whose run started a container
_STREAM_SECONDS = 30 * 24 * 3600  # a stage may be silent for as long as it trains
_EPOCH = "0"  # SOURCE_DATE_EPOCH: the same files give the same image


@dataclass
class Running:
    """A started container. Once its output has ended, `code` is its exit status, and `out_of_memory` says
    whether the kernel killed a process of it at its limit.
    """

    container: Any
    output: Iterator[tuple[bytes | None, bytes | None]]
    code: int | None = None
    out_of_memory: bool = False


def _listens(container: Any) -> bool:
    """Whether process 1 of a container catches SIGTERM. The kernel keeps it from one that does not, such as a
    stage that is still importing, which has nothing to save. True where this cannot be seen, as with an
    engine in a virtual machine.
    """
    container.reload()
    try:
        status = Path(f"/proc/{container.attrs['State']['Pid']}/status").read_text()
    except OSError:
        return True
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "")
    return not caught or bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


class Docker:
    name = "docker"
    scratch = SCRATCH

    def __init__(self, repo: Path, home: Path, user: tuple[int, int] | None = None):
        """`user` is (uid, gid) of the containers; the caller's if not given."""
        self.repo, self.home = repo, home.absolute()
        self.user = user or (os.getuid(), os.getgid())
        self._client: Any = None

    @property
    def client(self) -> Any:
        if self._client is None:
            try:
                self._client = docker.from_env(timeout=_STREAM_SECONDS)
                self._client.ping()
            except (DockerException, OSError) as fault:
                self._client = None
                raise Refused(unanswered(fault)) from fault
        return self._client

    def tag(self, image: Image) -> str:
        """What an environment is called once it is made."""
        return f"{REPOSITORY}/env-{image.name}:{images.fingerprint(image, self.name)}"

    def environment(self, image: Image) -> str:
        """What a stage's image starts from: the environment, or its base where it has no Dockerfile."""
        return self.tag(image) if (image.folder / "Dockerfile").exists() else image.args.get("base", "")

    def baked(self, program: Program) -> str:
        return f"{REPOSITORY}/{program.stage}:{program.fingerprint(self.name)}"

    # --- what is missing ------------------------------------------------------------------------------------

    def check(self, environments: list[Image], gpu: bool) -> list[Finding]:
        if lacking := no_engine():
            return [lacking]
        info = self.client.info()
        findings = [*plugin_findings(), *(gpu_findings(info) if gpu else [])]
        findings += machine_findings(environments, images.machine_type(info.get("Architecture")))
        root = Path(info.get("DockerRootDir", "/"))
        needed = 5.0 * sum(not self._there(self.tag(image)) for image in environments)
        if root.exists() and (free := shutil.disk_usage(root).free / 1e9) < needed:
            findings.append(
                error(
                    "docker",
                    f"{size(free * GB)} free at {root}",
                    f"about {size(needed * GB)} for images that are not built yet",
                    "Free some space there (docker system df).",
                )
            )
        return findings

    # --- images ---------------------------------------------------------------------------------------------

    def prepare(self, image: Image, on_line: Callable[[str], None]) -> None:
        """Builds `annie/env-<image>:<fingerprint>`, which `annie/env-<image>:latest` names too; a folder
        without a Dockerfile stands for its base image as it is.
        """
        if not (image.folder / "Dockerfile").exists():
            return
        tag = self.tag(image)
        if not self._there(tag):
            arguments = {name.upper(): value for name, value in image.args.items()}
            self._build(
                image.folder / "Dockerfile",
                tag,
                image.folder.parent,
                {"wheels": images.wheels()},
                arguments,
                {kept.ENVIRONMENT: image.name},
                on_line,
            )
        self.client.images.get(tag).tag(tag.rpartition(":")[0], "latest")

    def bake(self, program: Program, on_line: Callable[[str], None]) -> None:
        """Builds `annie/<stage>:<fingerprint>`, which `annie/<stage>:latest` names too."""
        if not program.dockerfile.is_file():
            raise Refused(
                error(
                    f"stages/{program.stage}",
                    "no Dockerfile",
                    "one that puts the stage's code on its environment",
                    "CONTRIBUTING.md, Add a stage, has its lines; or run with --executor local.",
                )
            )
        tag, environment = self.baked(program), self.environment(program.environment)
        if not self._there(tag):
            with tempfile.TemporaryDirectory() as context:
                program.copy(Path(context))
                self._build(
                    program.dockerfile,
                    tag,
                    Path(context),
                    {},
                    {"ENVIRONMENT": environment},
                    {_STAGE: program.stage, kept.ENVIRONMENT: environment},
                    on_line,
                )
        self.client.images.get(tag).tag(f"{REPOSITORY}/{program.stage}", "latest")

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
        """As ProductBuilder says, with `output` as context. The base that the image's arguments name goes
        before `environment`.
        """
        base = image.args.get("base") or self.environment(environment)
        repository = tag.rpartition(":")[0]
        labels = labels | {
            "org.opencontainers.image.title": repository.rpartition("/")[2],
            "org.opencontainers.image.version": VERSION,
            "io.annie.base": base,
        }
        named: dict[str, Path | None] = {**contexts, "image": image.folder}
        self._build(image.folder / "Dockerfile", tag, output, named, {"BASE": base}, labels, on_line)
        built = self.client.images.get(tag)
        built.tag(repository, "latest")
        (output / "image.json").write_text(
            json.dumps({"tag": tag, "id": built.id, "labels": labels}, indent=1) + "\n"
        )

    def _build(
        self,
        dockerfile: Path,
        tag: str,
        context: Path,
        contexts: dict[str, Path | None],
        arguments: dict[str, str],
        labels: dict[str, str],
        on_line: Callable[[str], None],
    ) -> None:
        with tempfile.TemporaryDirectory() as empty:
            command = [
                "docker",
                "buildx",
                "build",
                "--load",
                "--progress=plain",
                "--provenance=false",
                f"--tag={tag}",
                f"--file={dockerfile}",
            ]
            command += [f"--build-context={name}={folder or empty}" for name, folder in contexts.items()]
            command += [f"--build-arg={name}={value}" for name, value in arguments.items()]
            command += [f"--label={name}={value}" for name, value in labels.items()]
            run_logged(
                [*command, str(context)],
                on_line,
                f"image {tag}",
                "The lines above say which step; run again, finished steps are kept.",
                env={**os.environ, "SOURCE_DATE_EPOCH": _EPOCH},
            )

    def _there(self, tag: str) -> bool:
        try:
            self.client.images.get(tag)
        except ImageNotFound:
            return False
        return True

    def kept(self) -> list[KeptImage]:
        return kept.kept(self.client)

    def tags(self, environments: list[Image], programs: list[Program]) -> list[str]:
        baked = [self.baked(program) for program in programs if program.dockerfile.is_file()]
        return [*map(self.tag, environments), *baked]

    def remove(self, name: str) -> Finding | None:
        return kept.remove(self.client, name)

    # --- a stage --------------------------------------------------------------------------------------------

    def submit(self, task: Task) -> Running:
        self.end_orphans()
        scratch = Path(task.job["scratch"])
        kernels = self.kernels(task)
        folders = [Path(task.job["output"]), scratch, scratch / "home", *([kernels] if kernels else [])]
        job = task.folder / f"{task.prefix}.json"
        inside, mounts = container_job(task)
        modes.write(job, json.dumps(inside, indent=1) + "\n")
        for path in [job, *map(modes.make_folder, folders)]:
            if self.user != (os.getuid(), os.getgid()):
                os.chown(path, *self.user)
        spec = self.spec(task, job, mounts)
        render.write_script(
            task.folder / f"{task.prefix}.sh",
            task.stage,
            "Its output goes where it did then.",
            [spec.as_command()],
        )
        try:
            container = self.client.containers.create(**spec.as_api())
            output = container.attach(stdout=True, stderr=True, stream=True, logs=True, demux=True)
            container.start()
        except (APIError, NotFound) as fault:
            self.end_orphans()
            raise Refused(
                error(
                    task.stage,
                    f"an engine that did not start it: {fault.explanation or fault}",
                    "a started container",
                    "Run build.py doctor.",
                )
            ) from fault
        return Running(container, output)

    def spec(self, task: Task, job: Path, mounts: list[tuple[str, str, bool]]) -> ContainerSpec:
        program = task.program
        environment = {
            "HOME": "/scratch/home",
            "USER": "annie",
            "LOGNAME": "annie",
            **stage_environment(task.network),
        }
        if kernels := self.kernels(task):
            environment[KERNELS] = KERNELS_INSIDE
            mounts = [*mounts, (str(kernels), KERNELS_INSIDE, False)]
        return ContainerSpec(
            image=self.baked(program),
            command=["/job.json"] if program.own else ["-m", program.module, "/job.json"],
            user=f"{self.user[0]}:{self.user[1]}",
            network="bridge" if task.network else "none",
            environment=environment,
            mounts=[(str(job), "/job.json", True), *mounts],
            labels={_OWNER: str(self.home), _STAGE: task.stage},
            gpu=task.gpu,
            entrypoint=None if program.own else "python3",
            memory=int(task.memory_gb * GB),
            pids=task.pids,
        )

    def kernels(self, task: Task) -> Path | None:
        environment = task.program.environment
        fingerprint = images.fingerprint(environment, self.name)
        return kernel_folder(self.home, environment, fingerprint) if task.gpu else None

    def command(self, program: Program, arguments: list[str | Path]) -> list[str]:
        """Each file of a folder is mounted by its real path: in the hub's cache, files are links to where
        the container cannot follow them.
        """
        mounts: list[tuple[str, str, bool]] = []

        def inside(number: int, argument: str | Path) -> str:
            if isinstance(argument, str):
                return argument
            target = PurePosixPath("/read", str(number), argument.resolve().name)
            mounts.extend(
                (str(path.resolve()), str(target / path.name), True)
                for path in sorted(argument.iterdir())
                if path.is_file()
            )
            return str(target)

        words = [inside(number, argument) for number, argument in enumerate(arguments)]
        return ContainerSpec(
            image=self.baked(program),
            command=["-m", program.module, *words],
            user=f"{self.user[0]}:{self.user[1]}",
            network="none",
            environment={"HOME": "/tmp", **stage_environment(network=False)},
            mounts=mounts,
            entrypoint="python3",
        ).as_command()

    def poll(self, running: Running) -> int | None:
        return running.code

    def logs(self, running: Running) -> Iterator[Line]:
        rest: dict[Literal["stdout", "stderr"], bytes] = {"stdout": b"", "stderr": b""}
        for stdout, stderr in running.output:
            for stream, chunk in (("stdout", stdout), ("stderr", stderr)):
                *whole, rest[stream] = (rest[stream] + (chunk or b"")).split(b"\n")  # type: ignore[index]
                for text in whole:
                    yield Line(stream, text.decode(errors="replace").rstrip("\r"))  # type: ignore[arg-type]
        for stream, text in rest.items():
            if text:
                yield Line(stream, text.decode(errors="replace"))
        try:
            running.code = running.container.wait()["StatusCode"]
            running.container.reload()
            running.out_of_memory = running.container.attrs["State"]["OOMKilled"]
            running.container.remove(force=True)
        except NotFound:  # somebody removed it: the stage has not finished
            running.code = 137

    def out_of_memory(self, running: Running) -> bool:
        return running.out_of_memory

    def cancel(self, running: Running) -> None:
        try:
            with contextlib.suppress(KeyboardInterrupt):  # of a user who does not wait: removing it kills it
                if _listens(running.container):
                    running.container.stop(timeout=GRACE)
            running.container.remove(force=True)
        except NotFound:
            pass
        running.code = running.code if running.code is not None else 130

    def neighbours(self) -> list[Neighbour]:
        """By their labels. Without an engine there is none; `check` says that no engine answers. While
        nobody holds the store's lock, its containers are those of a killed run.
        """
        if no_engine():
            return []
        orphans = None if lock.holder(self.home / "store" / "lock") else (_OWNER, str(self.home))
        return neighbours(self.client, _STAGE, kept.KEY, orphans)

    def end_orphans(self) -> None:
        """Ends containers that a killed run of this store left: its lock is ours, so nobody waits for
        them.
        """
        if no_engine():
            return
        ours = {"label": f"{_OWNER}={self.home}"}
        for container in self.client.containers.list(all=True, filters=ours, ignore_removed=True):
            try:
                container.remove(force=True)
            except NotFound:
                continue
