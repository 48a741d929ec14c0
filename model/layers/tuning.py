"""How mamba-ssm's Triton kernels are compiled and tuned: no recompilation for a new length, and no search for
a GPU whose best configuration is known.

Each of the fifteen kernels of Mamba-2's scan is autotuned: every process would compile and time seven to nine
configurations. `prepare` gives each kernel only the configuration that tuning.json has for this GPU, so it is
compiled once and not timed. On a GPU that is not in the table Triton searches as usual, and the result is
saved in the folder of model/layers/kernel_cache.py for the next process. If runs must be equal
(model/layers/determinism.py), the smallest blocks are used instead. Triton's own cache
(TRITON_CACHE_AUTOTUNING) skips kernels whose configurations have a hook, as most of these do. Numbers of
tokens and chunks are not specialised: by default Triton recompiles a kernel if such a number becomes a
multiple of 16 or stops being one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.layers import determinism, kernel_cache, kernel_watch

if TYPE_CHECKING:
    from triton import Config, JITFunction
    from triton.runtime import Autotuner

TABLE = Path(__file__).with_name("tuning.json")
# arguments that depend on a pack's number of tokens
LENGTHS = ("seqlen", "nchunks", "stride_seq_idx_batch", "M", "rows_per_program")
MODULES = ("ssd_bmm", "ssd_chunk_scan", "ssd_chunk_state", "ssd_combined", "ssd_state_passing")


def configurations(gpu: str) -> dict[str, dict[str, Any]]:
    """Kernel -> configuration for a GPU, by its name in torch; empty if the GPU is not in tuning.json."""
    kernels: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())["gpus"].get(gpu, {})
    return kernels


def digest() -> str:
    """SHA-256 of the table. The table decides which configurations run, and so the order of sums."""
    return hashlib.sha256(TABLE.read_bytes()).hexdigest()


def tuners() -> Iterator[tuple[str, Autotuner]]:
    """Name and triton.runtime.Autotuner of every tuned kernel of mamba-ssm's scan. Raises ImportError
    without mamba-ssm or Triton.
    """
    import importlib

    from triton.runtime import Autotuner

    names = set()
    for module in MODULES:
        for name, value in vars(importlib.import_module(f"mamba_ssm.ops.triton.{module}")).items():
            if isinstance(value, Autotuner) and name not in names:
                names.add(name)
                yield name, value


@cache
def prepare() -> None:
    """Prepares every kernel for this process's GPU. Runs once, before the first kernel."""
    import torch
    import triton
    from mamba_ssm.ops.triton import layernorm_gated
    from triton.runtime.autotuner import Heuristics

    for value in vars(layernorm_gated).values():
        if isinstance(value, Heuristics):
            while isinstance(value.fn, Heuristics):
                value = value.fn
            value.fn = _unspecialised(value.fn)
    known = configurations(torch.cuda.get_device_name()) if torch.cuda.is_available() else {}
    earlier = read_searches()
    for name, tuner in tuners():
        tuner.fn = _unspecialised(tuner.fn)
        if name in known:
            chosen = dict(known[name])
            config = triton.Config(chosen.pop("arguments"), **chosen)
            config.pre_hook = next(
                (candidate.pre_hook for candidate in tuner.configs if candidate.pre_hook), None
            )
            tuner.configs = [config]
        elif determinism.enabled():
            tuner.configs = [smallest(tuner.configs)]
        else:
            add_searches(tuner, earlier.get(name, []))
            watch(name, tuner)


def smallest(configs: list[Config]) -> Config:
    """The configuration (triton.Config) whose blocks take the least shared memory, so that it fits on any
    GPU; of several, the first.
    """
    return min(configs, key=lambda config: config.num_stages * math.prod(config.kwargs.values()))


def _unspecialised(kernel: JITFunction) -> JITFunction:
    """The kernel, compiled once for all lengths."""
    import triton

    return triton.jit(kernel.fn, do_not_specialize=[name for name in kernel.arg_names if name in LENGTHS])


# --- results of searches, in tuning.json of the kernel cache ------------------------------------------------


def read_searches() -> dict[str, list[dict[str, Any]]]:
    """Kernel -> results of earlier processes' searches: `key` (Triton's: sizes and dtypes) and the
    configuration. Empty if nothing is kept.
    """
    path = _searches_file()
    if path is None or not path.exists():
        return {}
    try:
        kernels: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())["kernels"]
        return kernels
    except (ValueError, KeyError, TypeError) as fault:
        kernel_watch.say(f"{path} is not as it was written ({type(fault).__name__}): kernels are tuned anew")
        return {}


def add_searches(tuner: Autotuner, entries: list[dict[str, Any]]) -> None:
    """Puts earlier results into a tuner's cache. Results whose configuration the tuner no longer has are
    skipped, and searched for again.
    """
    for entry in entries:
        for config in tuner.configs:
            if as_json(config) == {name: entry.get(name) for name in as_json(config)}:
                tuner.cache[tuple(entry["key"])] = config


def watch(name: str, tuner: Autotuner) -> None:
    """Makes this tuner report each search before it begins, and save the result at once."""
    prune, run = tuner.prune_configs, tuner.run

    def prune_configs(*arguments: Any, **named: Any) -> Any:  # Triton calls it once a search
        kernel_watch.searching(name, len(tuner.configs))
        return prune(*arguments, **named)

    def run_and_remember(*arguments: Any, **named: Any) -> Any:
        known = len(tuner.cache)
        result = run(*arguments, **named)
        if len(tuner.cache) > known:
            write_searches(name, tuner)
        return result

    tuner.prune_configs, tuner.run = prune_configs, run_and_remember


def write_searches(name: str, tuner: Autotuner) -> None:
    """Saves this tuner's results next to those of other processes. Does nothing if nothing is kept; raises
    OSError.
    """
    path = _searches_file()
    if path is None:
        return
    kernels = read_searches()
    own_entries = [{"key": list(key), **as_json(config)} for key, config in tuner.cache.items()]
    kernels[name] = own_entries + [
        entry
        for entry in kernels.get(name, [])
        if entry["key"] not in [own_entry["key"] for own_entry in own_entries]
    ]
    # Renamed into place: a reader, or a process killed here, has the old file or the new one.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix="tuning-", delete=False) as opened:
        json.dump({"kernels": kernels}, opened, indent=1, sort_keys=True, default=str)
        os.fchmod(opened.fileno(), 0o644)  # readable for others: the folder may become part of an image
    os.replace(opened.name, path)


def _searches_file() -> Path | None:
    folder = kernel_cache.folder()
    return folder / "tuning.json" if folder else None


def as_json(config: Config) -> dict[str, Any]:
    """A triton.Config in the form of tuning.json."""
    return {"arguments": dict(config.kwargs), "num_warps": config.num_warps, "num_stages": config.num_stages}


# --- what ran -----------------------------------------------------------------------------------------------


def for_manifest() -> dict[str, Any]:
    """The manifest's entry: the table's digest, and this process's configurations. Empty if `prepare` has not
    run, because then no kernel of the scan ran.
    """
    return {"table": digest(), "chosen": used_configurations()} if prepare.cache_info().currsize else {}


def used_configurations() -> dict[str, dict[str, Any]]:
    """Kernel -> the configuration that this process ran it with, in the form of tuning.json; of several, the
    last.
    """
    configurations = {}
    for name, tuner in tuners():
        config = tuner.configs[0] if len(tuner.configs) == 1 else getattr(tuner, "best_config", None)
        if config is not None:
            configurations[name] = as_json(config)
    return configurations
