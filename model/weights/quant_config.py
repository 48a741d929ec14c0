"""The quantisation settings of a checkpoint, for loaders: `quantization_config` in config.json, or
hf_quant_config.json beside it.

If both exist, vLLM reads the first. ModelOpt writes both; NVIDIA's NVFP4 repository has the second only. So
has W4A4 of this project: every vLLM reads it the same way, and config.json stays as in the source.
W4A16_NVFP4 has both here, because vLLM recognises it in the first only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from model.weights.nvfp4 import GROUP
from model.weights.paths import CheckpointError, member, read_json

FILE, CONFIG, CONFIG_KEY = "hf_quant_config.json", "config.json", "quantization_config"
# quant_algo -> whether activations are quantised too; each linear then needs an input_scale.
ALGORITHMS = {"NVFP4": True, "W4A16_NVFP4": False}
# If only hf_quant_config.json has one of these, vLLM stops at "Unknown ModelOpt quant algo" (0.21, the first
# version with it, to 0.32).
ONLY_IN_CONFIG = ("W4A16_NVFP4",)
_FP8_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}
_CACHE_NAMES: dict[tuple[object, object], str] = {("float", 8): "FP8", ("float", 4): "NVFP4"}
LONGEST = 500  # characters of an exclude: the time to read a pattern grows with the square of its length
# vLLM refuses the file without any of them
_REQUIRED = ("quant_algo", "group_size", "kv_cache_quant_algo", "exclude_modules")


@dataclass(frozen=True)
class QuantConfig:
    """`file` contains these settings; `missing` are the keys that vLLM requires and the file lacks."""

    file: str
    algorithm: str
    group_size: int
    kv_cache: str | None
    excludes: tuple[str, ...]
    missing: tuple[str, ...] = ()


def write(folder: Path, settings: dict[str, Any]) -> None:
    """Writes `settings`, as layouts.hf_quant_config returns them, to where vLLM reads them:
    hf_quant_config.json, and config.json if the algorithm needs it.

    config.json must exist. Raises CheckpointError if it is no object, ValueError for settings that it cannot
    hold.
    """
    (folder / FILE).write_text(json.dumps(settings, indent=4) + "\n")
    if settings["quantization"]["quant_algo"] in ONLY_IN_CONFIG:
        config = read_json(folder / CONFIG) | {CONFIG_KEY: for_config_json(settings)}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def for_config_json(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` of hf_quant_config.json in the form of `quantization_config` in config.json: names differ,
    and the KV cache's setting is a table.
    """
    quantization = settings["quantization"]
    kv_cache = quantization["kv_cache_quant_algo"]
    if kv_cache not in (None, "FP8"):
        raise ValueError(f"kv_cache_quant_algo {kv_cache!r} has no form in {CONFIG}; expected FP8 or null")
    return {
        "quant_method": "modelopt",
        "quant_algo": quantization["quant_algo"],
        "group_size": quantization["group_size"],
        "producer": settings["producer"],
        **({"kv_cache_scheme": _FP8_CACHE} if kv_cache else {}),
        "ignore": quantization["exclude_modules"],
    }


def read(folder: Path, config: dict[str, Any]) -> list[QuantConfig]:
    """All settings of a checkpoint; the one that vLLM uses comes first. Raises CheckpointError on a file or
    value of unknown form.
    """
    configs = []
    if quantization := config.get(CONFIG_KEY):
        configs.append(_parsed(CONFIG, quantization, "ignore"))
    if member(folder, FILE).exists():
        configs.append(_parsed(FILE, read_json(folder / FILE).get("quantization"), "exclude_modules"))
    return configs


def _parsed(file: str, raw: object, listed: str) -> QuantConfig:
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} has no table of quantisation settings")
    excludes = raw.get(listed, [])
    if not isinstance(excludes, list) or not all(isinstance(name, str) for name in excludes):
        raise CheckpointError(f"{listed} of {file} is not a list of names")
    if (longest := max(map(len, excludes), default=0)) > LONGEST:
        raise CheckpointError(f"{listed} of {file} has a name of {longest:,} characters")
    groups = _table(raw, "config_groups", file) if file == CONFIG else {}
    inner = [_table(_table(groups, name, file), "weights", file).get("group_size") for name in groups]
    size = raw.get("group_size") or next(filter(None, inner), GROUP)
    if type(size) is not int:
        raise CheckpointError(f"group_size of {file} is {size!r}, expected a whole number")
    kv_cache = raw.get("kv_cache_quant_algo")
    if scheme := _table(raw, "kv_cache_scheme", file):  # the form of compressed-tensors
        kind = (scheme.get("type"), scheme.get("num_bits"))
        kv_cache = next((name for known, name in _CACHE_NAMES.items() if known == kind), json.dumps(scheme))
    if not isinstance(kv_cache, str | None):
        raise CheckpointError(f"kv_cache_quant_algo of {file} is {kv_cache!r}, expected a name or null")
    return QuantConfig(
        file,
        str(raw.get("quant_algo")).upper(),
        size,
        kv_cache,
        tuple(excludes),
        tuple(key for key in _REQUIRED if key not in raw) if file == FILE else (),
    )


def _table(settings: dict[str, Any], key: str, file: str) -> dict[str, Any]:
    """The table under `key`; empty if there is none. Raises CheckpointError for anything else."""
    value = settings.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{key} of {file} is {value!r}, expected a table")
    return value


def covers(exclude: str, module: str) -> bool:
    """Whether vLLM leaves `module` unquantised because of `exclude`, which is a substring of its name or a
    pattern for the whole name.

    So `layers.1` also covers layers 10 to 19. A pattern `name*` covers `name` and everything below it.
    """
    return exclude.removesuffix("*") in module or fnmatchcase(module, exclude)
