"""The numbers of a config.json that a stranger wrote, checked before anything is sized by them."""

from __future__ import annotations

import math
from typing import Any

from model.families.unknown import ConfigError

# Whole numbers of at least 1, and the largest of each: several times that of any published model.
SIZES = {
    "hidden_size": 2**18,
    "vocab_size": 2**24,
    "mamba_num_heads": 2**14,
    "mamba_head_dim": 2**14,
    "n_groups": 2**14,
    "ssm_state_size": 2**14,
    "conv_kernel": 2**10,
    "chunk_size": 2**16,
    "expand": 2**10,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "intermediate_size": 2**20,
    "n_routed_experts": 2**11,
    "n_shared_experts": 2**11,
    "n_group": 2**11,
    "topk_group": 2**11,
    "num_experts_per_tok": 2**11,
    "moe_intermediate_size": 2**20,
    "moe_shared_expert_intermediate_size": 2**20,
    "num_hidden_layers": 2**9,
    "max_position_embeddings": 2**30,
}
LAYERS = SIZES["num_hidden_layers"]
EXPERTS = 2**17  # of all layers together: each has two tensors with a name
# Finite numbers of at least 0. The two epsilons are also divided by.
NUMBERS = (
    "layer_norm_epsilon",
    "norm_eps",
    "routed_scaling_factor",
    "rope_theta",
    "partial_rotary_factor",
    "initializer_range",
    "attention_dropout",
    "hidden_dropout",
    "time_step_floor",
    "time_step_min",
    "time_step_max",
)
_REMEDY = "Take config.json from the model's own repository."


def check(config: dict[str, Any]) -> None:
    """Raises ConfigError with the name of the first field whose value no model can have. Fields that are
    absent are reported by whoever needs them.
    """
    for name, most in SIZES.items():
        value = config.get(name, 1)
        if type(value) is not int or not 1 <= value <= most:
            _refuse(name, value, f"a whole number from 1 to {most}")
    for name in NUMBERS:
        value = config.get(name, 0)
        if type(value) not in (int, float) or not 0 <= value < 2**63 or not math.isfinite(value):
            _refuse(name, value, "a finite number of at least 0")
    letters = config.get("hybrid_override_pattern") or ""
    if not isinstance(letters, str) or len(letters) > LAYERS:
        _refuse("hybrid_override_pattern", letters, f"a letter for each of at most {LAYERS} layers")
    if (count := letters.count("E") * config.get("n_routed_experts", 1)) > EXPERTS:
        _refuse("n_routed_experts", config["n_routed_experts"], f"{EXPERTS} experts in all, not {count}")


def _refuse(name: str, value: Any, expected: str) -> None:
    shown = ascii(value) if isinstance(value, str) else str(value)
    raise ConfigError(f"{name} in config.json is {shown[:60]}", expected, _REMEDY)
