"""Estimates the memory of a run before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from model import layouts
from model.families import registry
from model.families.family import Linear
from model.layers.projection import FORMS
from stages.job import StageError
from stages.train.parameters import Parameters

# method -> form in which the base is held; the most exact method first
METHODS: dict[Literal["lora", "nvfp4", "qlora"], str] = {"lora": "bf16", "nvfp4": "nvfp4", "qlora": "nf4"}
CACHED = 1.15  # the allocator reserves more than is in use


def bytes_needed(config: dict[str, Any], params: Parameters, count: int = 1) -> dict[str, float]:
    """Bytes by part: the base in its form, decoded copies of it, the adapter with its gradient and both Adam
    moments (float32), and activations.

    `count` processes divide the base's linears and experts among them.

    Activations are those of one packed sequence: the output of every layer, plus the backward pass of the
    layer that needs most (a dense stack of experts, and three times the rows of all expert choices). Without
    checkpointing every layer keeps its own activations.
    """
    family = registry.of(config)
    specs, linears = family.tensors(config), {linear.weight for linear in family.linears(config)}
    form = METHODS[params.method]
    number_bytes = 2 if params.precision == "bfloat16" else 4
    packed = {linear.weight for linear in layouts.linears(config, family.layout)}
    base = 0.0
    for name, spec in specs.items():
        size = torch.Size(spec.shape).numel() * (
            FORMS[form] / 8 if name in packed and form != "bf16" else number_bytes
        )
        base += size / count if name in linears else size
    factors = sum(
        params.rank * (linear.out + linear.inside) for linear in adapted_linears(config, params.targets)
    )
    tokens, hidden, choices = params.sequence_tokens, config["hidden_size"], config["num_experts_per_tok"]
    width = max(config["moe_intermediate_size"], hidden)
    stack = (
        2 * config["n_routed_experts"] * config["moe_intermediate_size"] * hidden * number_bytes
        if form != "bf16" or count > 1
        else 0
    )
    layer = (
        stack
        + 6 * tokens * choices * width * number_bytes
        + 4 * tokens * config["moe_shared_expert_intermediate_size"] * number_bytes
    )
    layers, decoded = len(family.kinds(config)), 0.0
    if form != "bf16":
        decoded = min(
            1e9 * params.decoded_gb,
            sum(
                number_bytes * torch.Size(spec.shape).numel()
                for name, spec in specs.items()
                if name in packed
            ),
        )
    layer_inputs = layers * tokens * hidden * number_bytes
    return {
        "base": base,
        **({"decoded": decoded} if decoded else {}),
        "adapter": 16.0 * factors,
        "activations": layer_inputs + layer
        if params.gradient_checkpointing
        else layer_inputs + layers * layer / 2,
    }


def adapted_linears(config: dict[str, Any], targets: str) -> list[Linear]:
    """The linears that the preset `targets` puts LoRA on, in the checkpoint's order."""
    return registry.of(config).targeted(config, targets)


def check_rank(config: dict[str, Any], params: Parameters) -> None:
    """Raises StageError if the rank is larger than the smaller side of an adapted matrix, which limits the
    rank of any update.
    """
    linears = adapted_linears(config, params.targets)
    narrow = min(linears, key=lambda linear: min(linear.out, linear.inside), default=None)
    if narrow and params.rank > min(narrow.out, narrow.inside):
        raise StageError(
            f"rank {params.rank}, and {narrow.weight} is {narrow.out} x {narrow.inside}",
            f"a rank of at most {min(narrow.out, narrow.inside)}",
            "Lower rank; 8 to 64 is usual, and memory and time grow with it",
        )


def available_bytes(device: str) -> int:
    """Bytes that a process on `device` can take. A GB10 shares its memory with the CPU and reports none of
    its own, so /proc/meminfo is read.
    """
    if device == "cuda" and not torch.cuda.get_device_properties(0).is_integrated:
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            # the processes of torchrun on this machine share it
            return int(line.split()[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    raise StageError("no MemAvailable in /proc/meminfo", "a Linux machine", "Run this stage on Linux")


def check(config: dict[str, Any], params: Parameters, device: str, count: int = 1) -> None:
    """Raises StageError if a process needs more memory than is available; the error names a method that would
    fit. `count` processes divide the base among them.
    """
    parts, room = bytes_needed(config, params, count), available_bytes(device)
    needed = sum(parts.values()) * CACHED
    if needed <= room:
        return
    fitting = (
        method
        for method in METHODS
        if sum(
            bytes_needed(
                config,
                replace(params, method=method, gradient_checkpointing=True, decoded_gb=0.0),
                count,
            ).values()
        )
        * CACHED
        <= room
    )
    method = next(fitting, None)
    parts_text = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in parts.items())
    raise StageError(
        f"this run needs about {needed / 1e9:.0f} GB ({parts_text}), and {room / 1e9:.0f} GB are free",
        "enough memory for the method",
        (
            f"What fits: method {method} with gradient_checkpointing"
            if method
            else (
                "Lower sequence_tokens or rank, choose targets: attention, or let several GPUs hold the base"
                " (ranks, and sharded: true)"
            )
        ),
    )
