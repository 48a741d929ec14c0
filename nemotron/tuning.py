"""How mamba-ssm's Triton kernels are compiled and tuned here: nothing anew for a length, and no search where the winner is known.

Each of its fifteen kernels of Mamba-2's scan is autotuned: seven to nine configurations are compiled and timed in every process.
`prepare` gives each kernel the configuration of tuning.json for this GPU alone, so that it is compiled once and not timed. On a
GPU that the table does not have, Triton tunes as it would, or takes the smallest blocks where runs have to be equal
(nemotron/determinism.py). And a number of tokens or chunks is compiled as a number like any other: by default Triton compiles a
kernel anew when such a number becomes a multiple of 16, or is no longer one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from nemotron import determinism

TABLE = Path(__file__).with_name("tuning.json")
LENGTHS = ("seqlen", "nchunks", "stride_seq_idx_batch", "M", "rows_per_program")  # arguments that follow from a pack's tokens
MODULES = ("ssd_bmm", "ssd_chunk_scan", "ssd_chunk_state", "ssd_combined", "ssd_state_passing")


def table(gpu: str) -> dict[str, dict]:
    """Kernel -> configuration for a GPU by its name as torch gives it; empty for one that is not in tuning.json."""
    return json.loads(TABLE.read_text())["gpus"].get(gpu, {})


def digest() -> str:
    """SHA-256 of the table: what decides which configurations run, and so the order of sums."""
    return hashlib.sha256(TABLE.read_bytes()).hexdigest()


def tuners() -> Iterator[tuple[str, object]]:
    """Name and triton.runtime.Autotuner of every tuned kernel of mamba-ssm's scan. Raises ImportError without mamba-ssm or Triton."""
    import importlib

    from triton.runtime import Autotuner

    seen = set()
    for module in MODULES:
        for name, value in vars(importlib.import_module(f"mamba_ssm.ops.triton.{module}")).items():
            if isinstance(value, Autotuner) and name not in seen:
                seen.add(name)
                yield name, value


@cache
def prepare() -> None:
    """Prepares every kernel for this process's GPU; once, before the first of them runs."""
    import torch
    import triton

    from mamba_ssm.ops.triton import layernorm_gated
    from triton.runtime.autotuner import Heuristics

    for value in vars(layernorm_gated).values():
        if isinstance(value, Heuristics):
            while isinstance(value.fn, Heuristics):
                value = value.fn
            value.fn = _unspecialised(value.fn)
    known = table(torch.cuda.get_device_name()) if torch.cuda.is_available() else {}
    for name, tuner in tuners():
        tuner.fn = _unspecialised(tuner.fn)
        if name in known:
            chosen = dict(known[name])
            config = triton.Config(chosen.pop("arguments"), **chosen)
            config.pre_hook = next((its.pre_hook for its in tuner.configs if its.pre_hook), None)
            tuner.configs = [config]
        elif determinism.wanted():
            tuner.configs = [smallest(tuner.configs)]


def smallest(configs: list):
    """The configuration (triton.Config) whose blocks take the least shared memory: it fits on any GPU. Of several, the first."""
    return min(configs, key=lambda config: config.num_stages * math.prod(config.kwargs.values()))


def _unspecialised(kernel):
    """The kernel, compiled once for every length."""
    import triton

    return triton.jit(kernel.fn, do_not_specialize=[name for name in kernel.arg_names if name in LENGTHS])


def chosen() -> dict[str, dict]:
    """Kernel -> the configuration that this process has run it with, as tuning.json has it. Of several, the last."""
    found = {}
    for name, tuner in tuners():
        config = tuner.configs[0] if len(tuner.configs) == 1 else getattr(tuner, "best_config", None)
        if config is not None:
            found[name] = {"arguments": dict(config.kwargs), "num_warps": config.num_warps, "num_stages": config.num_stages}
    return found
