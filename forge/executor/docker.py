"""Stages as containers: run through Docker's API, built by BuildKit through the docker command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import DeviceRequest, Mount

from forge import VERSION, render
from forge import image as images
from forge.executor import KERNELS, Line, Task, kernel_folder, run_logged
from forge.executor.local import stage_environment
from forge.finding import Finding, Refused, error
from forge.image import Image

REPOSITORY = "annie"
SERVED = "annie/vllm-nemotron-annie"
CODE = ("stages", "model")
SCRATCH = "/scratch"  # a task's scratch folder, in its container
# the same in every container: Triton writes the absolute path of what it compiled beside it
KERNELS_INSIDE = "/kernels"
_OWNER = "io.annie.home"  # label: the store whose run started a container
_ENGINE = "Start a Docker engine (its context must be the current one), or run with --executor local."
_STREAM_SECONDS = 30 * 24 * 3600  # a stage may be silent for as long as it trains
_EPOCH = "0"  # SOURCE_DATE_EPOCH: the same files give the same image
_BUILDX = (0, 11)  # named build contexts with folders, and --load from any driver


def answers() -> bool:
    """Whether a Docker engine answers here."""
    return no_engine() is None


def no_engine(address: str | None = None) -> Finding | None:
    """Why no Docker engine answers; None if one does. `address` is a URL such as unix:///run/docker.sock
    (default: the environment's).
    """
    try:
        client = docker.DockerClient(address, timeout=5) if address else docker.from_env(timeout=5)
        try:
            client.ping()
        finally:
            client.close()
    except (DockerException, OSError) as fault:
        return _no_engine(fault)
    return None


def _no_engine(fault: BaseException) -> Finding:
    if any(isinstance(cause, PermissionError) for cause in _causes(fault)):
        return error(
            "docker",
            "an engine's socket that this user may not open",
            "a user in the group docker",
            "Run sudo usermod -aG docker $USER, then log out and in again; or run with --executor local.",
        )
    return error("docker", f"no engine answers ({fault})", "a Docker engine", _ENGINE)


def _causes(fault: BaseException | None) -> Iterator[BaseException]:
    """The exception and those that led to it: docker's own holds requests', which holds urllib3's, which
    holds the socket's.
    """
    while fault:
        yield fault
        fault = fault.__cause__ or fault.__context__


@dataclass
class Running:
    """A started container. `code` is its exit status once its output has ended."""

    container: Any
    output: Iterator[tuple[bytes | None, bytes | None]]
    code: int | None = None


@dataclass(frozen=True)
class Spec:
    """A container as the API and as `docker run` take it."""

    image: str
    command: list[str]
    user: str
    network: str
    environment: dict[str, str]
    mounts: list[tuple[str, str, bool]]  # (host path, container path, read-only)
    labels: dict[str, str] = field(default_factory=dict)
    gpu: bool = False

    def as_api(self) -> dict[str, Any]:
        return {
            "image": self.image,
            "command": self.command,
            "user": self.user,
            "network_mode": self.network,
            "environment": self.environment,
            "mounts": [
                Mount(target, source, type="bind", read_only=read_only)
                for source, target, read_only in self.mounts
            ],
            "labels": self.labels,
            "working_dir": "/annie",
            "shm_size": "2g",
            "read_only": True,
            "tmpfs": {"/tmp": "exec,mode=1777"},
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "entrypoint": [],
            "device_requests": [DeviceRequest(count=-1, capabilities=[["gpu"]])] if self.gpu else [],
        }

    def as_command(self) -> list[str]:
        """`docker run` with the same effect."""
        command = [
            "docker",
            "run",
            "--rm",
            f"--user={self.user}",
            f"--network={self.network}",
            "--workdir=/annie",
            "--read-only",
            "--tmpfs=/tmp:exec,mode=1777",
            "--shm-size=2g",
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",
        ]
        if self.gpu:
            command.append("--gpus=all")
        command += [f"--env={name}={value}" for name, value in self.environment.items()]
        command += [
            f"--mount=type=bind,source={source},target={target}{',readonly' if read_only else ''}"
            for source, target, read_only in self.mounts
        ]
        return [*command, "--entrypoint=", self.image, *self.command]


class Docker:
    name = "docker"
    scratch = SCRATCH

    def __init__(self, repo: Path, home: Path, user: tuple[int, int] | None = None):
        """`user` is (uid, gid) of the containers; the caller's if not given."""
        self.repo, self.home = repo, home.absolute()
        self.user = user or (os.getuid(), os.getgid())
        # image name -> tag of what was prepared, which a product may start from
        self._bases: dict[str, str] = {}
        self._client: Any = None

    @property
    def client(self) -> Any:
        if self._client is None:
            try:
                self._client = docker.from_env(timeout=_STREAM_SECONDS)
                self._client.ping()
            except (DockerException, OSError) as fault:
                self._client = None
                raise Refused(_no_engine(fault)) from fault
        return self._client

    def reference(self, image: Image) -> str:
        """What the engine knows a prepared image by."""
        return self._bases.get(image.name) or self.tag(image)

    def tag(self, image: Image) -> str:
        return f"{REPOSITORY}/{image.name}:{images.fingerprint(image, self.name)}"

    # --- what is missing ------------------------------------------------------------------------------------

    def check(self, wanted: list[Image], gpu: bool) -> list[Finding]:
        if lacking := no_engine():
            return [lacking]
        found = []
        if not _plugin("buildx", _BUILDX):
            found.append(
                error(
                    "docker buildx",
                    "no buildx, or one that is too old",
                    f"buildx {_BUILDX[0]}.{_BUILDX[1]} or newer",
                    "Install docker-buildx-plugin (docker-buildx on Debian).",
                )
            )
        if not _plugin("compose", (2, 20)):
            found.append(
                error(
                    "docker compose",
                    "no compose, or one that is too old",
                    "compose 2.20 or newer",
                    "Install docker-compose-plugin (docker-compose on Debian).",
                )
            )
        info = self.client.info()
        if gpu and "nvidia" not in info.get("Runtimes", {}) and not info.get("CDISpecDirs"):
            found.append(
                error(
                    "docker",
                    "an engine without the NVIDIA runtime",
                    "one that gives containers the GPU",
                    "Install nvidia-container-toolkit, run `nvidia-ctk runtime configure --runtime=docker`,"
                    " and restart the engine.",
                )
            )
        found += machine_findings(wanted, images.machine_type(info.get("Architecture")))
        root = Path(info.get("DockerRootDir", "/"))
        needed = 5.0 * sum(not self._there(self.tag(image)) for image in wanted)
        if root.exists() and (free := shutil.disk_usage(root).free / 1e9) < needed:
            found.append(
                error(
                    "docker",
                    f"{free:.1f} GB free at {root}",
                    f"about {needed:.0f} GB for images that are not built yet",
                    "Free some space there (docker system df).",
                )
            )
        return found

    # --- images ---------------------------------------------------------------------------------------------

    def prepare(self, image: Image, on_line: Callable[[str], None]) -> None:
        """Builds `annie/<image>:<fingerprint>`; a folder without a Dockerfile stands for its base image as
        it is.
        """
        if not (image.folder / "Dockerfile").exists():
            self._bases[image.name] = image.args.get("base", "")
            return
        tag = self.tag(image)
        self._bases[image.name] = tag
        if not self._there(tag):
            arguments = {name.upper(): value for name, value in image.args.items()}
            self._build(
                image,
                tag,
                image.folder.parent,
                {"wheels": _wheels()},
                arguments,
                {"io.annie.image": image.name},
                on_line,
            )

    def build_product(
        self,
        image: Image,
        contexts: dict[str, Path | None],
        output: Path,
        tag: str,
        labels: dict[str, str],
        on_line: Callable[[str], None],
    ) -> None:
        """Builds the serving image with `output` as context (a named context of None is empty), tags it by
        `tag` and `latest`, and writes output/image.json.
        """
        base = image.args.get("base") or self._bases.get("vllm")
        if not base:
            raise Refused(
                error(
                    f"image {image.name}",
                    "no base",
                    "the vllm image, prepared before",
                    "Let the stage run in the image vllm, or name `base` in the recipe.",
                )
            )
        name = f"{SERVED}:{tag}"
        labels = labels | {
            "org.opencontainers.image.title": "vllm-nemotron-annie",
            "org.opencontainers.image.version": VERSION,
            "io.annie.base": base,
        }
        named: dict[str, Path | None] = {**contexts, "image": image.folder}
        self._build(image, name, output, named, {"BASE": base}, labels, on_line)
        built = self.client.images.get(name)
        built.tag(SERVED, "latest")
        (output / "image.json").write_text(
            json.dumps({"tag": name, "id": built.id, "labels": labels}, indent=1) + "\n"
        )
        render.write_override(self.repo, name, json.loads((output / "serve.json").read_text())["device"])

    def _build(
        self,
        image: Image,
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
                f"--file={image.folder / 'Dockerfile'}",
            ]
            command += [f"--build-context={name}={folder or empty}" for name, folder in contexts.items()]
            command += [f"--build-arg={name}={value}" for name, value in arguments.items()]
            command += [f"--label={name}={value}" for name, value in labels.items()]
            run_logged(
                [*command, str(context)],
                on_line,
                f"image {image.name}",
                "The lines above say which step; run again, finished steps are kept.",
                env={**os.environ, "SOURCE_DATE_EPOCH": _EPOCH},
            )

    def _there(self, tag: str) -> bool:
        try:
            self.client.images.get(tag)
        except ImageNotFound:
            return False
        return True

    # --- a stage --------------------------------------------------------------------------------------------

    def submit(self, task: Task) -> Running:
        self._remove_orphans()
        scratch = Path(task.job["scratch"])
        kernels = self.kernels(task)
        for folder in (Path(task.job["output"]), scratch, scratch / "home", *([kernels] if kernels else [])):
            folder.mkdir(parents=True, exist_ok=True)
            if self.user != (os.getuid(), os.getgid()):
                os.chown(folder, *self.user)
        job = task.folder / f"{task.prefix}.json"
        inside, mounts = container_job(task)
        job.write_text(json.dumps(inside, indent=1) + "\n")
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
            self._remove_orphans()
            raise Refused(
                error(
                    task.stage,
                    f"the engine did not start its container: {fault.explanation or fault}",
                    "a container",
                    "Run build.py doctor.",
                )
            ) from fault
        return Running(container, output)

    def spec(self, task: Task, job: Path, mounts: list[tuple[str, str, bool]]) -> Spec:
        environment = {
            "HOME": "/scratch/home",
            "USER": "annie",
            "LOGNAME": "annie",
            "PYTHONPATH": "/annie",
            **stage_environment(task.network),
        }
        if kernels := self.kernels(task):
            environment[KERNELS] = KERNELS_INSIDE
            mounts = [*mounts, (str(kernels), KERNELS_INSIDE, False)]
        return Spec(
            image=self.reference(task.image),
            command=["python3", "-m", f"stages.{task.stage}", "/job.json"],
            user=f"{self.user[0]}:{self.user[1]}",
            network="bridge" if task.network else "none",
            environment=environment,
            mounts=[*code(task.repo), (str(job), "/job.json", True), *mounts],
            labels={_OWNER: str(self.home), "io.annie.stage": task.stage},
            gpu=task.gpu,
        )

    def kernels(self, task: Task) -> Path | None:
        return (
            kernel_folder(self.home, task.image, images.fingerprint(task.image, self.name))
            if task.gpu
            else None
        )

    def command(self, image: Image, module: str, arguments: list[str | Path]) -> list[str]:
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
        return Spec(
            image=self.reference(image),
            command=["python3", "-m", module, *words],
            user=f"{self.user[0]}:{self.user[1]}",
            network="none",
            environment={"HOME": "/tmp", "PYTHONPATH": "/annie", **stage_environment(network=False)},
            mounts=[*code(self.repo), *mounts],
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
            running.container.remove(force=True)
        except NotFound:  # somebody removed it: the stage has not finished
            running.code = 137

    def cancel(self, running: Running) -> None:
        try:
            running.container.stop(timeout=5)  # a stage is PID 1, which SIGTERM ends only if it listens
            running.container.remove(force=True)
        except NotFound:
            pass
        running.code = running.code if running.code is not None else 130

    def _remove_orphans(self) -> None:
        """Ends containers that a killed run of this store left: its lock is ours, so nobody waits for
        them.
        """
        for container in self.client.containers.list(all=True, filters={"label": f"{_OWNER}={self.home}"}):
            try:
                container.remove(force=True)
            except NotFound:
                continue


def machine_findings(wanted: list[Image], machine: str) -> list[Finding]:
    """The images whose torch no lock holds for an engine on this type of machine."""
    on_cpu = [image for image in wanted if image.args.get("torch") == "cpu"]
    machines = sorted({name for image in on_cpu for name in images.pythons(image.folder.parent)})
    if not on_cpu or machine in machines:
        return []
    return [
        error(
            "images",
            f"torch: cpu on {machine}",
            f"{' or '.join(machines)}, for which images/torch-*.lock hold torch",
            "Take a base with its own torch and `torch: base`.",
        )
    ]


def code(repo: Path) -> list[tuple[str, str, bool]]:
    """The mounts of the code that runs in a container."""
    return [(str(repo / name), f"/annie/{name}", True) for name in CODE if (repo / name).exists()]


def container_job(task: Task) -> tuple[dict[str, Any], list[tuple[str, str, bool]]]:
    """The job with the container's paths, and the mounts (host path, container path, read-only) that make
    them true.
    """
    mounts: list[tuple[str, str, bool]] = []

    def mounted(host: str, target: str, read_only: bool = True) -> str:
        mounts.append((host, target, read_only))
        return target

    job = dict(task.job)
    job["inputs"] = {name: mounted(path, f"/inputs/{name}") for name, path in task.job["inputs"].items()}
    job["sources"] = {
        name: [
            mounted(path, str(PurePosixPath("/sources", name, str(number), Path(path).name)))
            for number, path in enumerate(paths)
        ]
        for name, paths in task.job["sources"].items()
    }
    job["secrets"] = {name: mounted(path, f"/secrets/{name}") for name, path in task.job["secrets"].items()}
    job["output"] = mounted(task.job["output"], "/output", False)
    job["scratch"] = mounted(task.job["scratch"], SCRATCH, False)
    return job, mounts


def _wheels() -> Path | None:
    """A folder of wheels on this machine that a build may take torch from."""
    folder = os.environ.get("ANNIE_WHEELS") or os.environ.get("PIP_FIND_LINKS")
    return Path(folder) if folder and Path(folder).is_dir() else None


def _plugin(name: str, oldest: tuple[int, int]) -> bool:
    try:
        answer = subprocess.run(
            ["docker", name, "version"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return False
    for word in answer.replace("v", " ").split():
        parts = word.split(".")
        if len(parts) >= 2 and parts[0].isdigit() and parts[1].isdigit():
            return (int(parts[0]), int(parts[1])) >= oldest
    return False
