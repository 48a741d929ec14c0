"""What this machine lacks for a plan, named before anything runs."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from forge import secret
from forge.executor import Executor, Neighbour
from forge.finding import Finding, error, note, warning
from forge.plan import GB, Plan
from forge.recipe import Recipe, Step
from forge.report import size

MEMINFO = Path("/proc/meminfo")
SETTLE_SECONDS = 10  # how long a stage waits for memory that is about to be free
SERVING = "serving.json"  # in the home of a store from which a model is served


def memory_gb(meminfo: Path = MEMINFO) -> tuple[float, float]:
    """(available, total) memory in GB. From /proc/meminfo and never from the GPU's driver: on a GB10 the
    GPU shares the host's memory and NVML has no figure for it."""
    sizes = {}
    for line in meminfo.read_text().splitlines():
        name, _, rest = line.partition(":")
        if rest.split():
            sizes[name] = int(rest.split()[0]) * 1024 / GB
    return sizes["MemAvailable"], sizes["MemTotal"]


def disk_gb(folder: Path) -> float:
    """Free space for an ordinary user where `folder` is, or will be, in GB."""
    while not folder.exists():
        folder = folder.parent
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize / GB


def gpu_architecture() -> str | None:
    """`sm_121` for a GB10; None where no driver answers."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True
        ).stdout.split()
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return f"sm_{answer[0].replace('.', '')}" if answer else None


def memory_finding(stage: str, needed: float, home: Path, neighbours: list[Neighbour]) -> Finding | None:
    """Why `needed` GB of memory are not free for a stage: other programs hold them, or `neighbours` may yet
    take them. A warning if they will be, because a run ends the containers that a killed run left.
    """
    available, total = memory_gb()
    orphans = [each for each in neighbours if each.orphan]
    free = total - sum(each.memory_gb for each in neighbours if not each.orphan)
    if needed <= min(available, free):
        return None
    found = f"{size(available * GB)} of memory available of {size(total * GB)}"
    if neighbours:
        found += ", and containers that may take some: " + ", ".join(
            f"{each.what} ({each.container}) up to {each.memory_gb:g} GB" for each in neighbours
        )
    if needed <= min(available + sum(each.memory_gb for each in orphans), free):
        names = ", ".join(each.container for each in orphans)
        return warning(
            stage, found, size(needed * GB), f"A killed run left {names}: the next run ends it first."
        )
    if needed > total:
        return error(stage, found, size(needed * GB), "Take a smaller recipe, or a machine with more memory.")
    if (home / SERVING).exists():
        remedy = "Stop the server with python build.py serve --stop"
    elif neighbours:
        remedy = f"Let it end, or stop it with docker stop {neighbours[0].container}"
    else:
        remedy = "Stop what else is running on this machine"
    return error(stage, found, size(needed * GB), f"{remedy}, or take a smaller recipe.")


def memory_taken(stage: str, needed: float, home: Path, executor: Executor) -> Finding | None:
    """The same in the middle of a run, right before a stage starts. What the stage before it held may come
    back a little after its end, and is waited for.
    """
    for seconds in range(SETTLE_SECONDS, -1, -1):
        if (finding := memory_finding(stage, needed, home, executor.neighbours())) is None:
            return None
        time.sleep(min(seconds, 1))
    return finding


def findings(
    recipe: Recipe, plan: Plan, home: Path, gpu: str | None, neighbours: list[Neighbour]
) -> list[Finding]:
    """What stands in the way of `plan` on this machine, apart from what the executor itself finds.
    `neighbours` run beside it.
    """
    lacking = []
    free = disk_gb(home)
    if free < plan.disk_gb:
        lacking.append(
            error(
                "disk",
                f"{size(free * GB)} free at {home}",
                size(plan.disk_gb * GB),
                "Free some space, or set ANNIE_HOME to a larger disk.",
            )
        )
    for stage in plan.pending:
        if crowded := memory_finding(stage.name, stage.estimate.memory_gb, home, neighbours):
            lacking.append(crowded)
    if gpu is None and any(recipe.on_gpu(s.name) for s in plan.pending):
        lacking.append(
            error(
                "gpu",
                "no GPU that nvidia-smi can see",
                "one, since the recipe says gpu: cuda",
                "Install the driver, or take a recipe with gpu: none (tiny).",
            )
        )
    return lacking + secret_findings(recipe, [recipe.stages[s.name] for s in plan.pending])


def secret_findings(recipe: Recipe, steps: Iterable[Step]) -> list[Finding]:
    """Of the secrets of `steps`: where they were found, if the recipe names none, and what is wrong with the
    files that it names.
    """
    secrets = {name for step in steps for name in step.contract.secrets}
    lacking = [
        note(f"secret {found.name}", f"from {found.place}, since the recipe names none")
        for found in secret.found(recipe)
        if found.name in secrets
    ]
    for name in sorted(secrets & set(recipe.secrets)):
        path = recipe.secrets[name]
        if not path.is_file():
            lacking.append(
                error(
                    f"secret {name}",
                    f"no file {path}",
                    "a file with the secret and nothing else",
                    "Write it, or take the secret out of the recipe.",
                )
            )
        elif path.stat().st_mode & 0o077:
            lacking.append(
                warning(
                    f"secret {name}",
                    f"{path} can be read by others",
                    "a file for you alone",
                    f"chmod 600 {path}",
                )
            )
    return lacking
