"""How many operations one training step takes for a document, from config.json alone.

Operations of matrix products are counted, two per multiply-add, as bench/operations.py counts them part by
part. LoRA's own products are left out: at rank 16 on all targets they are about 1 % of the step, and they
grow with the tokens as the rest does.
"""

from __future__ import annotations

from typing import Any

from model.families.family import Operations
from model.families.nemotron_h.names import pattern

FORWARD, BACKWARD, ATTENTION_BACKWARD = 1, 1, 2.5  # in forwards; frozen matrices have no weight gradient
SCAN_BACKWARD = 2  # both factors of every product of the scan have a gradient


def count(config: dict[str, Any], recomputed: bool) -> Operations:
    """Operations of one training step for a document, by what they grow with.

    `config` is in hub form. `recomputed`: the backward runs every block's forward again (gradient
    checkpointing), but for the experts' down projection (model/layers/recompute.py). Per layer and forward:

    - a matrix of `in` x `out`: 2 * in * out a token; of the routed experts, those that a token is sent to;
    - Mamba's scan in chunks of c tokens: 2 * (groups * c * state + heads * c * size + 2 * heads * state *
      size) a token, for the scores, the scores times the values, and the states in and out;
    - causal attention: two products with half of the T x T square, 2 * T^2 * heads * head_dim;
    - lm_head: on trained tokens only.

    The attention backward forms the scores once more and has four gradients: 2.5 forwards.
    """
    layers = {letter: pattern(config).count(letter) for letter in "M*E"}
    hidden, again = config["hidden_size"], int(recomputed)
    passes = FORWARD + again + BACKWARD
    matrices = layers["M"] * _mamba(config) + layers["*"] * _attention(config) + layers["E"] * _shared(config)
    routed = layers["E"] * config["num_experts_per_tok"] * hidden * config["moe_intermediate_size"]
    routed_passes = 2 * passes - again  # of up and down; down is not recomputed
    scan_passes = FORWARD + again + SCAN_BACKWARD
    attention_passes = FORWARD + again + ATTENTION_BACKWARD
    return Operations(
        token=2 * (matrices * passes + routed * routed_passes) + layers["M"] * _scan(config) * scan_passes,
        square=int(2 * layers["*"] * config["num_attention_heads"] * config["head_dim"] * attention_passes),
        trained=2 * hidden * config["vocab_size"] * (FORWARD + BACKWARD),
    )


def _mamba(config: dict[str, Any]) -> int:
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    convolved = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    return int(config["hidden_size"] * (inner + convolved + config["mamba_num_heads"] + inner))


def _attention(config: dict[str, Any]) -> int:
    heads = config["num_attention_heads"] + config["num_key_value_heads"]
    return int(2 * config["hidden_size"] * config["head_dim"] * heads)


def _shared(config: dict[str, Any]) -> int:
    """The router and the shared expert."""
    width = config["moe_shared_expert_intermediate_size"]
    return int(config["hidden_size"] * (config["n_routed_experts"] + 2 * width))


def _scan(config: dict[str, Any]) -> int:
    heads, size = config["mamba_num_heads"], config["mamba_head_dim"]
    state, chunk = config["ssm_state_size"], config["chunk_size"]
    return int(2 * (config["n_groups"] * chunk * state + heads * chunk * size + 2 * heads * state * size))
