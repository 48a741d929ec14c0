"""What this machine lacks for a plan, named before anything runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from forge.finding import Finding, error, warning
from forge.plan import GB, Plan
from forge.recipe import Recipe

MEMINFO = Path("/proc/meminfo")


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


def findings(recipe: Recipe, plan: Plan, home: Path, gpu: str | None) -> list[Finding]:
    """What stands in the way of `plan` on this machine, apart from what the executor itself finds."""
    lacking = []
    free = disk_gb(home)
    if free < plan.disk_gb:
        lacking.append(
            error(
                "disk",
                f"{free:.3g} GB free at {home}",
                f"{plan.disk_gb:.3g} GB",
                "Free some space, or set ANNIE_HOME to a larger disk.",
            )
        )
    available, total = memory_gb()
    for stage in plan.pending:
        if stage.estimate.memory_gb > available:
            what = f"{available:.1f} GB of memory available of {total:.1f}"
            lacking.append(
                error(
                    stage.name,
                    what,
                    f"{stage.estimate.memory_gb:g} GB",
                    "Stop what else is running on this machine, or take a smaller recipe.",
                )
            )
    if gpu is None and any(recipe.on_gpu(s.name) for s in plan.pending):
        lacking.append(
            error(
                "gpu",
                "no GPU that nvidia-smi can see",
                "one, since the recipe says gpu: cuda",
                "Install the driver, or take a recipe with gpu: none (tiny).",
            )
        )
    secrets = {name for s in plan.pending for name in recipe.stages[s.name].contract.secrets}
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
