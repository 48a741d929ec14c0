"""An image: the folder `images/<name>/`, the build arguments of a recipe, and what of them decides its content."""

from __future__ import annotations

import hashlib
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path

from forge import hashing

# Beside an image and without effect on it.
_APART = ("README.md", "requirements.in", "kernels.in", "excludes.txt")
# What every image's build uses, beside its own folder.
_SHARED = ("torch.lock", "apply_patches.py", "uv.lock")
# What only the build of a real image reads: an environment of the local executor is the same without them.
_BUILD_ONLY = ("Dockerfile", "base.lock", "kernels.lock", "patches/series.base", "../uv.lock")


@dataclass(frozen=True)
class Image:
    """`args` are the recipe's build arguments, such as `base` (the image it starts from) and `torch` (cpu or base)."""

    name: str
    folder: Path
    args: dict[str, str] = field(default_factory=dict)


def files(image: Image) -> dict[str, Path]:
    """Name -> file of everything that goes into the image, in a stable order."""
    found = {
        str(path.relative_to(image.folder)): path
        for path in sorted(image.folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.name not in _APART
    }
    shared = {f"../{name}": image.folder.parent / name for name in _SHARED if (image.folder.parent / name).is_file()}
    return found | shared


def components(image: Image, executor: str) -> dict[str, str]:
    """Named components of the image's content, for keys: its files, its arguments, and where it runs."""
    read = {name: path for name, path in files(image).items() if executor != "local" or name not in _BUILD_ONLY}
    named = {f"image/{name}": hashlib.sha256(path.read_bytes()).hexdigest() for name, path in read.items()}
    named |= {f"image/arg/{name}": value for name, value in image.args.items()}
    named["image/executor"] = executor
    named["image/platform"] = platform.machine()
    if executor == "local":  # a virtual environment runs on the host's interpreter, an image on its base's
        named["image/python"] = f"{sys.version_info.major}.{sys.version_info.minor}"
    return named


def fingerprint(image: Image, executor: str) -> str:
    """Twelve hex digits that name an environment or an image's tag."""
    return hashing.of_value(components(image, executor))[:12]
