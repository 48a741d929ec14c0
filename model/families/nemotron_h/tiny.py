"""The shape of a NemotronH small enough for two CPU cores, with the real model's letters, config keys and
dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# The real model's layer-1 correction bias lies in 56.722-56.789: BF16 would make all values equal. The
# tiny model's lies there too.
BIAS_LOW, BIAS_HIGH = 56.722, 56.789


def config(pattern: str, hidden: int, experts: int, vocabulary: int) -> dict[str, Any]:
    """A config.json with the keys of the published BF16 checkpoint (without `auto_map`: there is no remote
    code beside it).

    Widths follow `hidden`: attention heads of 64, Mamba inner width twice the hidden size, experts half of
    it.
    """
    return {
        "architectures": ["NemotronHForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "chunk_size": 64,
        "conv_kernel": 4,
        "eos_token_id": 2,
        "expand": 2,
        "head_dim": 64,
        "hidden_dropout": 0.0,
        "hidden_size": hidden,
        "hybrid_override_pattern": pattern,
        "initializer_range": 0.02,
        "intermediate_size": hidden // 2,
        "layer_norm_epsilon": 1e-05,
        "mamba_head_dim": 64,
        "mamba_hidden_act": "silu",
        "mamba_num_heads": 2 * hidden // 64,
        "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32",
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "model_type": "nemotron_h",
        "moe_intermediate_size": hidden // 2,
        "moe_shared_expert_intermediate_size": hidden,
        "n_group": 1,
        "n_groups": 2,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "norm_eps": 1e-05,
        "norm_topk_prob": True,
        "num_attention_heads": hidden // 64,
        "num_experts_per_tok": 2,
        "num_hidden_layers": len(pattern),
        "num_key_value_heads": max(1, hidden // 128),
        "num_logits_to_keep": 1,
        "pad_token_id": 0,
        "partial_rotary_factor": 1.0,
        "rescale_prenorm_residual": True,
        "residual_in_fp32": False,
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "sliding_window": None,
        "ssm_state_size": 32,
        "tie_word_embeddings": False,
        "time_step_floor": 0.0001,
        "time_step_max": 0.1,
        "time_step_min": 0.001,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.53.2",
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
        "use_mamba_kernels": True,
        "vocab_size": vocabulary,
    }


def delicate_biases(model: nn.Module, seed: int) -> None:
    """Gives every router correction biases that are as close together, and as far from zero, as the real
    model's.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(BIAS_LOW + (BIAS_HIGH - BIAS_LOW) * torch.rand(buffer.shape, generator=generator))
