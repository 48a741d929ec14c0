"""Blocks that keep their input alone for the backward, and compute the rest again.

torch's own checkpointing runs a block's whole forward again. For a block of experts that is more than the backward asks for:
the down projection's output is never looked at (nemotron/experts.py), and nor is the sum over choices. Here those are left out,
a sixth of the block's matrix products.
"""

from __future__ import annotations

import types

import torch
from torch import nn

from nemotron import experts
from nemotron.grouped import Routing


def attach(model: nn.Module) -> None:
    """From now on every block of the model keeps its input alone (in training mode)."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for block in model.model.layers:
        if block.block_type == "moe":
            block.gradient_checkpointing = False
            block.forward = types.MethodType(forward, block)


def forward(self, hidden_states: torch.Tensor, **_) -> torch.Tensor:
    """A block of experts: (batch, tokens, hidden) to the same shape."""
    mixer = self.mixer
    return _Block.apply(hidden_states, self, *mixer.experts.up_proj.pair, *mixer.experts.down_proj.pair, *_trained(mixer.shared_experts))


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _parts(block: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, Routing, torch.Tensor, torch.Tensor]:
    """Normed rows (tokens, hidden), the router's choice as it sorts them and its shares, and what the shared expert gives."""
    mixer = block.mixer
    normed = block.norm(hidden)
    _, share, index = mixer.gate(normed)
    return normed.flatten(0, -2), Routing.of(index, mixer.experts.up_proj.experts), share, mixer.shared_experts(normed)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, block, *parameters):
        rows, routing, share, shared = _parts(block, hidden)
        routed, _ = experts.run(rows, routing, share, block.mixer.experts.up_proj, block.mixer.experts.down_proj)
        ctx.block = block
        ctx.save_for_backward(hidden)
        return hidden + routed.view_as(hidden) + shared

    @staticmethod
    def backward(ctx, g):
        (hidden,), block = ctx.saved_tensors, ctx.block
        with torch.enable_grad():
            start = hidden.detach().requires_grad_()
            rows, routing, share, shared = _parts(block, start)
        its = block.mixer.experts
        dx, dshare, *own = experts.gradients(g.flatten(0, -2), rows.detach(), routing, share.detach(), None, its.up_proj, its.down_proj)
        around, *rest = torch.autograd.grad([rows, share, shared], [start, *_trained(block.mixer.shared_experts)], [dx, dshare, g])
        return g + around, None, *own, *rest
