"""Which Docker engine answers here, and what it lacks for a run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import docker
from docker.errors import DockerException

from forge import image as images
from forge.executor import Neighbour
from forge.finding import Finding, error
from forge.image import Image
from forge.plan import GB

# The plugins of the docker command: its oldest version, and Debian's and Docker's names of its package.
_PLUGINS = {
    # named build contexts with folders, and --load from any driver
    "buildx": ((0, 11), "docker-buildx-plugin (docker-buildx on Debian)"),
    "compose": ((2, 20), "docker-compose-plugin (docker-compose on Debian)"),
}
_ENGINE = "Start a Docker engine (its context must be the current one), or run with --executor local."


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
        return unanswered(fault)
    return None


def unanswered(fault: BaseException) -> Finding:
    """What it means that an engine did not answer."""
    if any(isinstance(cause, PermissionError) for cause in _causes(fault)):
        return error(
            "docker",
            "an engine's socket that this user may not open",
            "a user in the group docker",
            "Run sudo usermod -aG docker $USER, then log out and in again; or run with --executor local.",
        )
    return error("docker", f"no engine that answers ({fault})", "a Docker engine", _ENGINE)


def _causes(fault: BaseException | None) -> Iterator[BaseException]:
    """The exception and those that led to it: docker's own holds requests', which holds urllib3's, which
    holds the socket's.
    """
    while fault:
        yield fault
        fault = fault.__cause__ or fault.__context__


def machine_findings(environments: list[Image], machine: str) -> list[Finding]:
    """The images whose torch no lock holds for an engine on this type of machine."""
    on_cpu = [image for image in environments if image.args.get("torch") == "cpu"]
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


def plugin_findings() -> list[Finding]:
    """The plugins of the docker command that are missing or too old."""
    return [
        error(
            f"docker {name}",
            f"no {name}, or one that is too old",
            f"{name} {oldest[0]}.{oldest[1]} or newer",
            f"Install {package}.",
        )
        for name, (oldest, package) in _PLUGINS.items()
        if not has_plugin(name, oldest)
    ]


def gpu_findings(info: dict[str, Any]) -> list[Finding]:
    """Why the engine that describes itself as `info` cannot give containers the GPU."""
    if "nvidia" in info.get("Runtimes", {}) or info.get("CDISpecDirs"):
        return []
    return [
        error(
            "docker",
            "an engine without the NVIDIA runtime",
            "one that gives containers the GPU",
            "Install nvidia-container-toolkit, run `nvidia-ctk runtime configure --runtime=docker`,"
            " and restart the engine.",
        )
    ]


def neighbours(
    client: Any, stage: str, served: str, orphans: tuple[str, str] | None = None
) -> list[Neighbour]:
    """The running containers of stages and served models, by the labels `stage` and `served`, that have a
    limit of memory. A model that a CPU serves takes far less than its limit, and is none of them. `orphans`:
    name and value of a label of those that a killed run left.
    """
    found = {}
    for label in (stage, served):
        for container in client.containers.list(filters={"label": label}, ignore_removed=True):
            host = container.attrs["HostConfig"]
            if host["Memory"] and (label == stage or host["DeviceRequests"]):
                what = f"stage {container.labels[stage]}" if label == stage else "the served model"
                left = orphans is not None and container.labels.get(orphans[0]) == orphans[1]
                found[container.name] = Neighbour(container.name, what, host["Memory"] / GB, left)
    return [found[name] for name in sorted(found)]


def has_plugin(name: str, oldest: tuple[int, int]) -> bool:
    """Whether the docker command has the plugin `name` in version `oldest` or newer."""
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
