"""Every tensor of a NemotronH checkpoint in hub layout, derived from its config.json.

Shapes follow the published checkpoint of Nemotron 3 Nano (6,243 tensors for the real config). `D` below is
the hidden size.
"""

from __future__ import annotations

import re
from typing import Any

from model.families.family import Spec

# Endings of tensors that are float32 in the published BF16 checkpoint: rounding any of these to BF16 changes
# the model's function.
FLOAT32 = ("A_log", "D", "e_score_correction_bias")
# Endings of float32 tensors in NVIDIA's NVFP4 checkpoint, besides scales; A_log and D are BF16 there.
FLOAT32_NVFP4 = ("gate.weight", "e_score_correction_bias")
LETTERS = {"M": "mamba", "*": "attention", "E": "experts"}

_HUB, _NATIVE = "backbone", "model"  # prefix of every name but lm_head's
EMBEDDINGS = f"{_HUB}.embeddings.weight"
FINAL_NORM = f"{_HUB}.norm_f.weight"
HEAD = "lm_head.weight"
_GROUPS = (
    ("shared", r"\.shared_experts\."),
    ("experts", r"\.experts\."),
    ("router", r"\.gate\."),
    ("attention", r"\.[qkvo]_proj\."),
    ("mamba", r"\.mixer\."),
    ("embeddings", r"embeddings\.|lm_head\."),
)


def pattern(config: dict[str, Any]) -> str:
    """The layers, one letter each: M Mamba-2, * attention, E experts. Raises ValueError if the config has no
    pattern.
    """
    letters: str | None = config.get("hybrid_override_pattern")
    if not letters:
        raise ValueError("config.json has no hybrid_override_pattern: vLLM and the hub's own code need it")
    if unknown := set(letters) - set(LETTERS):
        raise ValueError(f"hybrid_override_pattern holds {sorted(unknown)}, known are {sorted(LETTERS)}")
    return letters


def tensors(config: dict[str, Any], float32: tuple[str, ...] = FLOAT32) -> dict[str, Spec]:
    """Hub name -> shape and dtype of every tensor of the unquantised checkpoint of `config`. The dtype is F32
    if the name ends in one of `float32`, else BF16.
    """
    d, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {EMBEDDINGS: (vocabulary, d)}
    layer = {"M": _mamba, "*": _attention, "E": _experts}
    for number, letter in enumerate(pattern(config)):
        prefix = f"{_HUB}.layers.{number}"
        shapes[f"{prefix}.norm.weight"] = (d,)
        shapes |= {f"{prefix}.mixer.{name}": shape for name, shape in layer[letter](config).items()}
    shapes[FINAL_NORM] = (d,)
    shapes[HEAD] = (vocabulary, d)
    endings = tuple(f".{ending}" for ending in float32)
    return {name: Spec(shape, "F32" if name.endswith(endings) else "BF16") for name, shape in shapes.items()}


def _mamba(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, heads = config["hidden_size"], config["mamba_num_heads"]
    inner = heads * config["mamba_head_dim"]
    conv = inner + 2 * config["n_groups"] * config["ssm_state_size"]  # x, B and C go through the convolution
    return {
        "A_log": (heads,),
        "D": (heads,),
        "dt_bias": (heads,),
        "conv1d.weight": (conv, 1, config["conv_kernel"]),
        "conv1d.bias": (conv,),
        "in_proj.weight": (inner + conv + heads, d),  # z, xBC, dt
        "norm.weight": (inner,),
        "out_proj.weight": (d, inner),
    }


def _attention(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, size = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return {
        "q_proj.weight": (queries, d),
        "k_proj.weight": (keys, d),
        "v_proj.weight": (keys, d),
        "o_proj.weight": (d, queries),
    }


def _experts(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, count, width = config["hidden_size"], config["n_routed_experts"], config["moe_intermediate_size"]
    shared = config["moe_shared_expert_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"gate.weight": (count, d), "gate.e_score_correction_bias": (count,)}
    for expert in range(count):
        shapes[f"experts.{expert}.up_proj.weight"] = (width, d)
        shapes[f"experts.{expert}.down_proj.weight"] = (d, width)
    shapes["shared_experts.up_proj.weight"] = (shared, d)
    shapes["shared_experts.down_proj.weight"] = (d, shared)
    return shapes


def native(name: str) -> str:
    """Hub name -> name in the native transformers class. An expert's matrix maps to its stack. A native name
    stays as it is.
    """
    parts = name.split(".")
    if parts[0] == _HUB:
        parts[0] = _NATIVE
    if (index := _stack_index(parts)) is None:
        return ".".join(parts)
    return ".".join([*parts[: index + 1], parts[index + 2]])


def hub(name: str, expert: int | None = None) -> str:
    """Native name -> hub name. For a stack `expert` selects the matrix, because the hub has one name per
    matrix. A hub name stays as it is.
    """
    parts = name.split(".")
    if parts[0] == _NATIVE:
        parts[0] = _HUB
    return ".".join(parts if expert is None else [*parts[:-1], str(expert), parts[-1]])


def expert(name: str) -> int | None:
    """Index of the expert that a hub name belongs to; None for a tensor outside of the stacks."""
    parts = name.split(".")
    index = _stack_index(parts)
    return None if index is None else int(parts[index + 1])


def layer(name: str) -> int | None:
    """Index of the layer that a name of either form belongs to; None for a tensor outside of the layers."""
    parts = name.split(".")
    return int(parts[2]) if parts[1:2] == ["layers"] else None


def in_layer(name: str, number: int) -> str:
    """The name, in either form, of the same tensor in layer `number`."""
    parts = name.split(".")
    return ".".join([*parts[:2], str(number), *parts[3:]])


def block(number: int) -> str:
    """The native name of a layer's block."""
    return f"{_NATIVE}.layers.{number}"


def group(name: str) -> str:
    """The parameter group of a native tensor name, with or without peft's prefixes."""
    if "lora_" in name:
        return "adapter"
    return next((label for label, rule in _GROUPS if re.search(rule, name)), "norms")


def _stack_index(parts: list[str]) -> int | None:
    """Index of the part `experts` in a split hub name; None if no expert's number follows it."""
    index = parts.index("experts") if "experts" in parts else len(parts)
    return index if parts[index + 1 : index + 2] and parts[index + 1].isdigit() else None
