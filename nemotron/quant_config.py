"""What a checkpoint says of its own quantisation, for loaders: `quantization_config` in config.json, or hf_quant_config.json beside it.

vLLM takes the first where both are there. ModelOpt writes both; NVIDIA's NVFP4 repository and this project have only the second, which every
vLLM reads the same way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from nemotron.checkpoint import CheckpointError, read_json

FILE = "hf_quant_config.json"
# quant_algo -> whether the activations are quantised too, which takes an input_scale for each linear.
ALGORITHMS = {"NVFP4": True, "W4A16_NVFP4": False}
GROUP = 16
_NEEDED = ("quant_algo", "group_size", "kv_cache_quant_algo", "exclude_modules")  # vLLM refuses the file without any of them


@dataclass(frozen=True)
class QuantConfig:
    """`file` is where it stands, `missing` the keys that vLLM asks for and that are not there."""

    file: str
    algorithm: str
    group_size: int
    kv_cache: str | None
    excludes: tuple[str, ...]
    missing: tuple[str, ...] = ()


def read(folder: Path, config: dict) -> list[QuantConfig]:
    """Everything that is said, what vLLM takes first. Raises CheckpointError on a file or value that is none of the known forms."""
    found = []
    if inside := config.get("quantization_config"):
        found.append(_of("config.json", inside, "ignore"))
    if (folder / FILE).exists():
        found.append(_of(FILE, read_json(folder / FILE).get("quantization"), "exclude_modules"))
    return found


def _of(file: str, raw: object, listed: str) -> QuantConfig:
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} has no table of quantisation settings")
    excludes = raw.get(listed, [])
    if not isinstance(excludes, list) or not all(isinstance(name, str) for name in excludes):
        raise CheckpointError(f"{listed} of {file} is not a list of names")
    groups = raw.get("config_groups") or {}
    inner = [(group.get("weights") or {}).get("group_size") for group in groups.values()] if file == "config.json" else []
    scheme = raw.get("kv_cache_scheme")
    kv_cache = raw.get("kv_cache_quant_algo")
    if isinstance(scheme, dict):  # as compressed-tensors says it
        kv_cache = "FP8" if (scheme.get("type"), scheme.get("num_bits")) == ("float", 8) else json.dumps(scheme)
    return QuantConfig(
        file, str(raw.get("quant_algo")).upper(), raw.get("group_size") or next(filter(None, inner), GROUP), kv_cache, tuple(excludes),
        tuple(key for key in _NEEDED if key not in raw) if file == FILE else (),
    )


def covers(exclude: str, module: str) -> bool:
    """Whether vLLM leaves `module` unquantised because of `exclude`: a part of its name, or a pattern of all of it.

    So `backbone.layers.1` also covers layers 10 to 19. A pattern `name*` stands for `name` and all below it.
    """
    return exclude.removesuffix("*") in module or fnmatchcase(module, exclude)
