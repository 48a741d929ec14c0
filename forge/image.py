"""An image: the folder `images/<name>/`, the build arguments of a recipe, and what of them decides its
content.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from forge import hashing
from forge.executors import EXECUTORS

# Beside an image and without effect on it.
_APART = ("README.md", "requirements.in", "kernels.in", "excludes.txt")
# What every image's build uses, beside its own folder and the torch lock of the machine.
_SHARED = ("machines.toml", "install_torch.py", "apply_patches.py", "uv.lock")
# What only the build of a real image reads: an environment of the local executor is the same without them.
_BUILD_ONLY = ("Dockerfile", "base.lock", "kernels.lock", "patches/series.base", "../uv.lock")


@dataclass(frozen=True)
class Image:
    """`args` are the recipe's build arguments, such as `base` (the image it starts from) and `torch` (cpu
    or base).
    """

    name: str
    folder: Path
    args: dict[str, str] = field(default_factory=dict)


def machine_type(name: str | None = None) -> str:
    """A machine type in the words of Linux's `uname -m`: x86_64, aarch64. Docker and macOS have other
    words for the same.
    """
    name = name or platform.machine()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def pythons(folder: Path) -> dict[str, str]:
    """Machine type -> Python version of the local executor's environments, from machines.toml in the
    images' folder.
    """
    path = folder / "machines.toml"
    return (
        {name: table["python"] for name, table in tomllib.loads(path.read_text()).items()}
        if path.exists()
        else {}
    )


def files(image: Image, machine: str) -> dict[str, Path]:
    """Name -> file of everything that goes into the image on a machine of this type, in a stable order."""
    own = {
        str(path.relative_to(image.folder)): path
        for path in sorted(image.folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.name not in _APART
    }
    shared_names = (f"torch-{machine}.lock", *_SHARED)
    shared = {
        f"../{name}": image.folder.parent / name
        for name in shared_names
        if (image.folder.parent / name).is_file()
    }
    return own | shared


def components(image: Image, executor: str, machine: str | None = None) -> dict[str, str]:
    """Named components of the image's content, for keys: its files, its arguments, and where it runs
    (default: this machine).
    """
    machine = machine_type(machine)
    read = {
        name: path
        for name, path in files(image, machine).items()
        if EXECUTORS[executor].images or name not in _BUILD_ONLY
    }
    named = {f"image/{name}": hashlib.sha256(path.read_bytes()).hexdigest() for name, path in read.items()}
    named |= {f"image/arg/{name}": value for name, value in image.args.items()}
    named["image/executor"] = executor
    named["image/platform"] = machine
    if not EXECUTORS[executor].images:  # an image's Python comes with its base
        named["image/python"] = pythons(image.folder.parent).get(machine, "none")
    return named


def fingerprint(image: Image, executor: str, machine: str | None = None) -> str:
    """Twelve hex digits that name an environment or an image's tag."""
    return hashing.of_value(components(image, executor, machine))[:12]


def wheels() -> Path | None:
    """A folder of wheels on this machine that a build may take torch from."""
    folder = os.environ.get("ANNIE_WHEELS") or os.environ.get("PIP_FIND_LINKS")
    return Path(folder) if folder and Path(folder).is_dir() else None
