"""A stage's container as a value: what it mounts, and how it is started by the API and by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from docker.types import DeviceRequest, Mount

from forge.executor import FIRST_TO_GO, Task

SCRATCH = "/scratch"  # a task's scratch folder, in its container


@dataclass(frozen=True)
class ContainerSpec:
    """A container as the API and as `docker run` take it. It mounts data; its code is the image's."""

    image: str
    command: list[str]
    user: str
    network: str
    environment: dict[str, str]
    mounts: list[tuple[str, str, bool]]  # (host path, container path, read-only)
    labels: dict[str, str] = field(default_factory=dict)
    gpu: bool = False
    entrypoint: str | None = None  # None: the image's own
    memory: int | None = None  # bytes, tmpfs and shared memory included; None: no limit
    pids: int | None = None  # processes and threads; None: no limit

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
            "shm_size": "2g",
            "read_only": True,
            "tmpfs": {"/tmp": "exec,mode=1777"},
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "entrypoint": self.entrypoint,
            "mem_limit": self.memory,
            "memswap_limit": self.memory,  # of memory and swap together: it does not swap
            "pids_limit": self.pids,
            "oom_score_adj": FIRST_TO_GO,
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
            "--read-only",
            "--tmpfs=/tmp:exec,mode=1777",
            "--shm-size=2g",
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",
            f"--oom-score-adj={FIRST_TO_GO}",
        ]
        if self.memory:
            command += [f"--memory={self.memory}", f"--memory-swap={self.memory}"]
        if self.pids:
            command.append(f"--pids-limit={self.pids}")
        if self.gpu:
            command.append("--gpus=all")
        command += [f"--env={name}={value}" for name, value in self.environment.items()]
        command += [
            f"--mount=type=bind,source={source},target={target}{',readonly' if read_only else ''}"
            for source, target, read_only in self.mounts
        ]
        if self.entrypoint:
            command.append(f"--entrypoint={self.entrypoint}")
        return [*command, self.image, *self.command]


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
    if "previous" in task.job:
        job["previous"] = mounted(task.job["previous"], "/previous")
    job["output"] = mounted(task.job["output"], "/output", False)
    job["scratch"] = mounted(task.job["scratch"], SCRATCH, False)
    return job, mounts
