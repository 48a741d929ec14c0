"""Blocks that save only their input for the backward and recompute the rest; in shorter packs only as many
blocks as memory requires.

torch's checkpointing runs a block's whole forward again. For a block of experts the backward needs less: it
uses neither the down projection's output (model/layers/experts.py) nor the sum over choices. Leaving these
out saves a sixth of the block's matrix products.

Memory must hold the longest pack with every block recomputed. A shorter pack leaves some of it free, so as
many of the last blocks as fit save everything. A step of eight short conversations then needs a third fewer
launches and less decoding.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from model.layers import experts
from model.layers.grouped import Routing
from model.layers.loss import CHUNK

if TYPE_CHECKING:
    from transformers import NemotronHConfig

    from model.layers.structure import Block, Model


def attach(model: Model, capacity: int = 0) -> None:
    """Makes the blocks of a model save their input only (in training mode).

    `capacity`: tokens of the longest pack. On a GPU the last blocks of a shorter pack save what fits into the
    memory of the longest. With 0, and on a CPU, whose scan saves more than is counted here, no block does.
    """
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
    )
    for block in model.model.layers:
        if block.block_type == "moe":
            block.forward = types.MethodType(forward, block)
    keep_last(model, 0)
    if capacity:

        def choose(inner: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            ids = named["input_ids"]
            if inner.training and ids.is_cuda:
                keep_last(
                    model,
                    blocks_that_fit(
                        model.config,
                        [block.block_type for block in model.model.layers],
                        ids.numel(),
                        capacity,
                    ),
                )

        model.model.register_forward_pre_hook(choose, with_kwargs=True)


def keep_last(model: Model, count: int) -> None:
    """Makes the last `count` blocks save everything, and the others their input."""
    blocks = model.model.layers
    for number, block in enumerate(blocks):
        again = number < len(blocks) - count
        block.recomputed = again
        block.gradient_checkpointing = again and block.block_type != "moe"


def blocks_that_fit(config: NemotronHConfig, kinds: list[str], tokens: int, capacity: int) -> int:
    """How many of the last blocks can save everything in a pack of `tokens` without taking more memory than a
    pack of `capacity` tokens with every block recomputed. `kinds`: the types of all blocks in order.
    """
    logits = CHUNK * config.vocab_size * 12  # bytes in float32, as softmax, and in BF16

    def peak_bytes(length: int, kept_bytes: float) -> float:
        inputs = len(kinds) * length * config.hidden_size * 2
        # during the backward of a block of experts
        rows = 6 * length * config.num_experts_per_tok * config.moe_intermediate_size * 2
        return inputs + kept_bytes + max(rows, logits)

    kept_bytes, count, room = 0.0, 0, peak_bytes(capacity, 0.0)
    for kind in reversed(kinds):
        kept_bytes += tokens * bytes_kept(config, kind)
        if peak_bytes(tokens, kept_bytes) > room:
            break
        count += 1
    return count


def bytes_kept(config: NemotronHConfig, kind: str) -> float:
    """Bytes per token that a block of this type saves in addition to its input, in BF16 on a GPU."""
    hidden = config.hidden_size
    if kind == "moe":
        rows = config.num_experts_per_tok * config.moe_intermediate_size
        return 2 * (3 * hidden + rows + 3 * config.moe_shared_expert_intermediate_size) + 4 * (
            hidden + 8 * config.n_routed_experts
        )
    if kind == "full_attention":
        return 2 * (
            2 * hidden + 2 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
        )
    inner = config.mamba_num_heads * config.mamba_head_dim
    conv = inner + 2 * config.n_groups * config.ssm_state_size
    return 2 * (2 * hidden + inner + 2 * conv + 3 * inner) + 16 * config.mamba_num_heads


def forward(self: Block, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
    """A block of experts: (batch, tokens, hidden) to the same shape."""
    mixer = self.mixer
    if not (self.recomputed and self.training):
        normed = self.norm(hidden_states)
        output: torch.Tensor = hidden_states + mixer(normed)
        return output
    up, down = experts.stacks(mixer.experts)
    return _Block.apply(
        hidden_states,
        self,
        *up.trainable_factors,
        *down.trainable_factors,
        *_trainable(mixer.shared_experts),
    )


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _router_and_shared(
    block: Block, hidden: torch.Tensor
) -> tuple[torch.Tensor, Routing, torch.Tensor, torch.Tensor]:
    """Normed rows (tokens, hidden), the router's choice as a Routing, its shares, and the output of the
    shared expert.
    """
    mixer = block.mixer
    normed = block.norm(hidden)
    _, share, index = mixer.gate(normed)
    return (
        normed.flatten(0, -2),
        Routing.of(index, experts.stacks(mixer.experts)[0].experts),
        share,
        mixer.shared_experts(normed),
    )


class _Block(torch.autograd.Function):
    apply: ClassVar[Callable[..., torch.Tensor]]

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, block: Block, *parameters: torch.Tensor | None
    ) -> torch.Tensor:
        rows, routing, share, shared = _router_and_shared(block, hidden)
        routed, _ = experts.run(rows, routing, share, *experts.stacks(block.mixer.experts))
        ctx.block = block
        ctx.save_for_backward(hidden)
        return hidden + routed.view_as(hidden) + shared

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,), block = ctx.saved_tensors, ctx.block
        with torch.enable_grad():
            start = hidden.detach().requires_grad_()
            rows, routing, share, shared = _router_and_shared(block, start)
        up, down = experts.stacks(block.mixer.experts)
        dx, dshare, *expert_gradients = experts.gradients(
            g.flatten(0, -2), rows.detach(), routing, share.detach(), None, up, down
        )
        around, *shared_gradients = torch.autograd.grad(
            [rows, share, shared], [start, *_trainable(block.mixer.shared_experts)], [dx, dshare, g]
        )
        return g + around, None, *expert_gradients, *shared_gradients
