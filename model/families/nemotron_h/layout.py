"""Which linears are quantised, and what a quantised checkpoint then holds.

`nvidia` is NVIDIA's published layout for Nemotron 3 Nano: attention stays BF16, and so do both
projections of the Mamba layer directly before each attention layer, every convolution, the router and
lm_head.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from model.families.nemotron_h import names
from model.families.nemotron_h.names import Spec
from model.weights.nvfp4 import GROUP

LAYOUTS = {
    "nvidia": (
        "experts, shared experts and Mamba projections, but for the Mamba layer before each attention layer"
    ),
    "conservative": "experts and shared experts; vLLM before the in_proj repair (0.12-0.17.1) can load it",
    "experts": "routed experts only",
}
PARTS = ("weight_scale", "weight_scale_2", "input_scale")


def quantised(config: dict[str, Any], layout: str) -> list[str]:
    """Hub names, without `.weight`, of the linears that are quantised, in checkpoint order."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")
    letters = names.pattern(config)
    found = []
    for name in names.tensors(config):
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            continue
        number = int(module.split(".")[2])
        kept_mamba = letters[number] == "M" and letters[number + 1 : number + 2] == "*"
        if (
            ".experts." in module
            or (".shared_experts." in module and layout != "experts")
            or (layout == "nvidia" and letters[number] == "M" and not kept_mamba)
        ):
            found.append(module)
    return found


def recognise(config: dict[str, Any], packed: set[str]) -> tuple[str, list[str]]:
    """The layout of a checkpoint in which the linears `packed` are packed (`other` if none of ours), and
    what is quantised in it.

    What vLLM loads as one, the experts of a layer and its q, k and v, counts as quantised if most of it
    is: a single odd one is a fault and no layout.
    """
    fused: dict[str, list[str]] = defaultdict(list)
    for name in names.tensors(config):
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            parent, _, projection = module.rpartition(".")
            together = (
                parent.split(".experts.")[0]
                if ".experts." in parent
                else parent
                if projection in ("q_proj", "k_proj", "v_proj")
                else module
            )
            fused[together].append(module)
    chosen = [
        module
        for group in fused.values()
        if 2 * len(packed.intersection(group)) > len(group)
        for module in group
    ]
    return (
        next((layout for layout in LAYOUTS if set(quantised(config, layout)) == set(chosen)), "other"),
        chosen,
    )


def excluded(config: dict[str, Any], layout: str) -> list[str]:
    """`exclude_modules` of hf_quant_config.json: every linear and convolution that stays as it is, and
    lm_head.

    The router is left out, as in NVIDIA's file: it is no linear layer for any loader.
    """
    chosen = set(quantised(config, layout))
    modules = [name.removesuffix(".weight") for name in names.tensors(config) if name.endswith(".weight")]
    kept = [m for m in modules if m.endswith(("_proj", ".conv1d")) and m not in chosen]
    return ["lm_head", *kept]


def tensors(
    config: dict[str, Any], layout: str, source: dict[str, Spec] | None = None, weight_only: bool = False
) -> dict[str, Spec]:
    """Hub name -> shape and dtype of every tensor of the quantised checkpoint.

    What is not quantised keeps the shape and dtype of `source` (default: the BF16 checkpoint's).
    """
    return packed_tensors(source or names.tensors(config), quantised(config, layout), not weight_only)


def packed_tensors(source: dict[str, Spec], modules: list[str], input_scales: bool = True) -> dict[str, Spec]:
    """`source` with its linears `modules` packed: (out, in) becomes U8 (out, in / 2), F8_E4M3 (out, in /
    16) and one or two F32 scalars of shape ().
    """
    chosen = set(modules)
    found: dict[str, Spec] = {}
    for name, spec in source.items():
        module = name.removesuffix(".weight")
        if module not in chosen or not name.endswith(".weight"):
            found[name] = spec
            continue
        out, inside = spec.shape
        found[name] = Spec((out, inside // 2), "U8")
        found[f"{module}.weight_scale"] = Spec((out, inside // GROUP), "F8_E4M3")
        found[f"{module}.weight_scale_2"] = Spec((), "F32")
        if input_scales:
            found[f"{module}.input_scale"] = Spec((), "F32")
    return found


def hf_quant_config(
    config: dict[str, Any], layout: str, kv_cache: str | None, producer: str, weight_only: bool = False
) -> dict[str, Any]:
    """hf_quant_config.json in the form that every vLLM version reads; model/weights/quant_config.py writes
    it, for weights alone into config.json too.
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
