"""Types of the attributes of NemotronH's native class that are read here, after model/assemble.py has changed
it.

For mypy only, because torch types every attribute of a module as Tensor | Module. No object has these
classes, and they are imported under TYPE_CHECKING only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import NemotronHConfig

from model.layers.graphs import Graphs
from model.layers.projection import Projection


class Norm(nn.Module):
    weight: nn.Parameter  # (width,)
    variance_epsilon: float


class GatedNorm(Norm):
    group_size: int


class Mamba(nn.Module):
    """NemotronHMamba2Mixer; `implementation` is the argument of mamba.attach."""

    activation: str
    implementation: str | None
    time_step_limit: tuple[float, float]
    n_groups: int
    ssm_state_size: int
    intermediate_size: int
    conv_dim: int
    num_heads: int
    chunk_size: int
    in_proj: Projection
    conv1d: nn.Conv1d
    dt_bias: nn.Parameter  # (heads,), as A_log and D
    A_log: nn.Parameter
    D: nn.Parameter
    norm: GatedNorm
    out_proj: Projection


class Stacks(nn.Module):
    """The routed experts of a layer: NemotronHExperts."""

    up_proj: Projection
    down_proj: Projection


class Experts(nn.Module):
    """NemotronHMoE."""

    gate: nn.Module
    experts: Stacks
    shared_experts: nn.Module


class Block(nn.Module):
    """NemotronHBlock. `mixer` is typed for a block of experts, the only kind whose mixer is read here.
    `recomputed` belongs to model/layers/recompute.py.
    """

    block_type: str
    norm: Norm
    mixer: Experts
    gradient_checkpointing: bool
    recomputed: bool


class Backbone(nn.Module):
    layers: Sequence[Block]


class Model(nn.Module):
    """NemotronHForCausalLM. `placed` and `hub_config` are arguments of assemble.empty, `linears` the model's
    linears by hub name (model/families/family.py, Linear), `graphs` the result of assemble.capture.
    """

    model: Backbone
    lm_head: nn.Linear
    config: NemotronHConfig
    placed: tuple[torch.dtype, str]
    hub_config: dict[str, Any]
    linears: dict[str, Any]
    graphs: Graphs
    get_input_embeddings: Callable[[], nn.Embedding]
    set_experts_implementation: Callable[[str], None]
    set_attn_implementation: Callable[[str], None]
    gradient_checkpointing_enable: Callable[..., None]
