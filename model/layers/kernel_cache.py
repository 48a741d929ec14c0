"""Keeps compiled kernels and tuned configurations after a process and its container end.

Whoever starts a stage on a GPU names a folder in ANNIE_KERNELS (docs/formats.md, Kernels). Each combination
of GPU, driver, torch and Triton has a subfolder there. `prepare` points the caches of Triton, inductor, CUDA,
vLLM and FlashInfer to it. It must run before these are loaded, so this module imports the standard library
only. An image may contain a filled folder, the seed; an empty subfolder starts as a copy of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

FOLDER, SEED = "ANNIE_KERNELS", "ANNIE_KERNELS_SEED"
BAKED = "/opt/annie/kernels"  # the seed, where SEED names no other
# Environment variable of a cache -> its subfolder. FlashInfer adds .cache/flashinfer to it.
CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
    "VLLM_CACHE_ROOT": "vllm",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
}
_GROUP = "__grp__"  # prefix of Triton's files that list a kernel's other files by absolute path

_prepared: Path | None = None


class UnknownGPU(Exception):
    """The GPU and its driver cannot be identified."""


def prepare(warn: Callable[[str, str], None]) -> Path | None:
    """Points every cache without a location to this machine's subfolder, and returns it. Returns None if
    ANNIE_KERNELS is not set.

    If nothing can be kept, it calls `warn(message, remedy)`, leaves the caches at their libraries' defaults
    and returns None.
    """
    global _prepared
    _prepared = None
    if not (root := os.environ.get(FOLDER)):
        return None
    try:
        subfolder = Path(root) / identity()
        copy_seed(subfolder, Path(os.environ.get(SEED) or BAKED))
        for name in CACHES.values():
            (subfolder / name).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=subfolder):  # the folder may exist but not be writable
            pass
    except (OSError, UnknownGPU) as fault:
        warn(
            f"kernels that are compiled in this run are not kept: {fault}",
            f"Give this user a folder in {FOLDER} ({root}) that can be written, and a driver that nvidia-smi"
            " can ask; until then every start compiles anew",
        )
        return None
    for variable, name in CACHES.items():
        os.environ.setdefault(variable, str(subfolder / name))
    _prepared = subfolder
    return subfolder


def folder() -> Path | None:
    """The subfolder that `prepare` chose in this process; None if nothing is kept."""
    return _prepared


def identity() -> str:
    """A folder name made of all that decides whether a compiled kernel can be reused: GPU, driver, torch and
    Triton. Raises UnknownGPU.
    """
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as fault:
        raise UnknownGPU(f"nvidia-smi does not name the GPU ({fault})") from fault
    # several GPUs of one kind share kernels
    gpus = sorted({line.strip() for line in answer.splitlines() if line.strip()})
    if not gpus:
        raise UnknownGPU("nvidia-smi lists no GPU")
    return re.sub(
        r"[^A-Za-z0-9.+]+",
        "-",
        f"{'+'.join(gpus)} torch {version('torch')} triton {version('triton', 'pytorch-triton')}",
    )


def version(*distributions: str) -> str:
    """The installed version of the first of these distributions that is installed; "none" if none is. Imports
    nothing.
    """
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def copy_seed(target: Path, seeds: Path) -> None:
    """Copies the folder of the same name in `seeds` to `target`, if it exists and `target` is empty or
    missing. Raises OSError.
    """
    seed = seeds / target.name
    if not seed.is_dir() or (target.is_dir() and any(target.iterdir())):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    copy = Path(tempfile.mkdtemp(prefix="seed-", dir=target.parent))
    try:
        copy.chmod(0o755)
        for path in sorted(seed.rglob("*")):
            place = copy / path.relative_to(seed)
            if path.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            elif path.name.startswith(_GROUP):
                place.write_text(relocated(path.read_text(), target / path.parent.relative_to(seed)))
            else:
                shutil.copyfile(path, place)  # without its mode: a seed may be read-only
        try:
            copy.rename(target)
        except OSError:
            if not any(target.iterdir()):
                raise
            # Another process of this run was first, with the same seed.
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def relocated(group: str, place: Path) -> str:
    """Triton's list of a kernel's files, with paths in the folder `place`. Triton uses a compiled kernel only
    if the listed paths exist.
    """
    listed = json.loads(group)
    listed["child_paths"] = {name: str(place / name) for name in listed["child_paths"]}
    return json.dumps(listed)
