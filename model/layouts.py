"""What a quantised checkpoint contains in each layout of its family, and which layout a checkpoint has."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Any

from model.families import registry
from model.families.family import Config, Linear, Spec
from model.weights.nvfp4 import GROUP

PARTS = ("weight_scale", "weight_scale_2", "input_scale")


def linears(config: Config, layout: str) -> tuple[Linear, ...]:
    """The linears that `layout` quantises, in checkpoint order. Raises ValueError for an unknown layout."""
    return _linears(json.dumps(config), layout)


@cache  # stage quantize calls it five times, for thousands of linears
def _linears(config: str, layout: str) -> tuple[Linear, ...]:
    parsed: Config = json.loads(config)
    return tuple(registry.of(parsed).quantised(parsed, layout))


def quantised(config: Config, layout: str) -> list[str]:
    """Hub names, without `.weight`, of `linears`."""
    return [linear.name for linear in linears(config, layout)]


def recognise(config: Config, packed: set[str]) -> tuple[str, list[str]]:
    """The layout of a checkpoint whose packed linears are `packed` (`other` if it is none of ours), and the
    linears that count as quantised.

    Loaders fuse some linears: the experts of a layer, or its q, k and v. Such a group counts as quantised if
    most of it is, because a single odd linear is a fault and not a layout.
    """
    family = registry.of(config)
    groups: dict[str, list[Linear]] = defaultdict(list)
    for linear in family.linears(config):
        groups[linear.group].append(linear)
    chosen = [
        linear.name
        for group in groups.values()
        if 2 * sum(linear.name in packed for linear in group) > len(group)
        for linear in group
    ]
    return (
        next((layout for layout in family.layouts if set(quantised(config, layout)) == set(chosen)), "other"),
        chosen,
    )


def excluded(config: Config, layout: str) -> list[str]:
    """`exclude_modules` of hf_quant_config.json: every linear and convolution that is not quantised, the head
    first.
    """
    family, chosen = registry.of(config), set(quantised(config, layout))
    head = family.head.removesuffix(".weight")
    return [head, *(m for m in family.excludable(config) if m not in chosen and m != head)]


def tensors(
    config: Config, layout: str, source: dict[str, Spec] | None = None, weight_only: bool = False
) -> dict[str, Spec]:
    """Hub name -> shape and dtype of every tensor of the quantised checkpoint.

    Unquantised tensors keep the shape and dtype of `source` (default: the BF16 checkpoint).
    """
    plain = source or registry.of(config).tensors(config)
    return packed_tensors(plain, quantised(config, layout), not weight_only)


def packed_tensors(
    source: dict[str, Spec], modules: Iterable[str], input_scales: bool = True
) -> dict[str, Spec]:
    """`source` with the linears `modules` packed: (out, in) becomes U8 (out, in / 2), F8_E4M3 (out, in / 16)
    and one or two F32 scalars of shape ().
    """
    chosen = set(modules)
    specs: dict[str, Spec] = {}
    for name, spec in source.items():
        module = name.removesuffix(".weight")
        if module not in chosen or not name.endswith(".weight"):
            specs[name] = spec
            continue
        out, inside = spec.shape
        specs[name] = Spec((out, inside // 2), "U8")
        specs[f"{module}.weight_scale"] = Spec((out, inside // GROUP), "F8_E4M3")
        specs[f"{module}.weight_scale_2"] = Spec((), "F32")
        if input_scales:
            specs[f"{module}.input_scale"] = Spec((), "F32")
    return specs


def hf_quant_config(
    config: Config, layout: str, kv_cache: str | None, producer: str, weight_only: bool = False
) -> dict[str, Any]:
    """hf_quant_config.json in the form that every vLLM version reads. model/weights/quant_config.py writes
    it, and for weight-only formats also into config.json.
    """
    return {
        "producer": {"name": "modelopt", "version": producer},
        "quantization": {
            "quant_algo": "W4A16_NVFP4" if weight_only else "NVFP4",
            "kv_cache_quant_algo": kv_cache,
            "group_size": GROUP,
            "exclude_modules": excluded(config, layout),
        },
    }
