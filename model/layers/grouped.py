"""Matrix products of tokens sorted by expert: one product per expert, over the rows routed to it.

On a GPU in BF16 all experts run in one launch: `torch.nn.functional.grouped_mm` if torch has a kernel for the
GPU, else our own (model/layers/tiles.py). Elsewhere it is a loop over the experts that have rows. None of
these is differentiable: model/layers/experts.py has its own backward, so no dense weight gradient can be
formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from model.layers import tiles

TORCH_KERNELS: tuple[int, ...] = (
    9,
    10,
)  # major compute capabilities; on others torch loops over the experts
ALIGNMENT = 8  # BF16 numbers: rows of a grouped product must be multiples of 16 bytes


@dataclass(frozen=True)
class Routing:
    """How the rows of (tokens, choices) are sorted by expert. With S = tokens * choices:

    `order` int64 (S,): index in the flattened (tokens, choices) of each sorted row; `inverse` int64 (S,): the
    inverse permutation; `token` int64 (S,): the token of each sorted row; `ends` int32 (experts,): the row
    after each expert's last.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    token: torch.Tensor
    ends: torch.Tensor

    @staticmethod
    def of(index: torch.Tensor, experts: int) -> Routing:
        """From the router's choice, int64 (tokens, choices)."""
        # One-byte keys need one pass of a radix sort. Nothing here waits for a size from the device, as
        # bincount would.
        flat = index.flatten().to(torch.uint8 if experts <= 256 else torch.int32)
        keys, order = flat.sort(stable=True)
        # The inverse of a permutation needs a scatter, not a second sort.
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        ends = torch.searchsorted(
            keys, torch.arange(experts, device=keys.device).to(keys.dtype), right=True, out_int32=True
        )
        return Routing(order, inverse, order // index.shape[-1], ends)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """Expert, first row and end row of every expert that has rows. Waits for the device."""
        ends = self.ends.tolist()
        return [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if b > a]


def in_one_launch(x: torch.Tensor) -> bool:
    """Whether products with `x` run in one launch."""
    return x.is_cuda and x.dtype == torch.bfloat16


def _torch_has_kernel(x: torch.Tensor) -> bool:
    return torch.cuda.get_device_capability(x.device)[0] in TORCH_KERNELS


def product(x: torch.Tensor, weight: torch.Tensor, routing: Routing) -> torch.Tensor:
    """`x[rows of e] @ weight[e].T` for every expert e: (S, in), (experts, out, in) -> (S, out)."""
    if in_one_launch(x):
        return (
            F.grouped_mm(x, weight.transpose(-2, -1), offs=routing.ends)
            if _torch_has_kernel(x)
            else tiles.product(x, weight, routing.ends)
        )
    out = x.new_empty(len(x), weight.shape[-2])  # every row has an expert
    for e, a, b in routing.spans:
        torch.mm(x[a:b], weight[e].t(), out=out[a:b])
    return out


def input_gradient(g: torch.Tensor, weight: torch.Tensor, routing: Routing) -> torch.Tensor:
    """`g[rows of e] @ weight[e]` for every expert e: (S, out), (experts, out, in) -> (S, in)."""
    if in_one_launch(g):
        return (
            F.grouped_mm(g, weight, offs=routing.ends)
            if _torch_has_kernel(g)
            else tiles.input_gradient(g, weight, routing.ends)
        )
    out = g.new_empty(len(g), weight.shape[-1])
    for e, a, b in routing.spans:
        torch.mm(g[a:b], weight[e], out=out[a:b])
    return out


def outer(g: torch.Tensor, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """`g[rows of e].T @ x[rows of e]` for every expert e: (S, out), (S, in) -> (experts, out, in); zeros
    for idle experts.
    """
    if in_one_launch(g):
        return (
            F.grouped_mm(g.t(), x, offs=routing.ends)
            if _torch_has_kernel(g)
            else tiles.outer(g, x, routing.ends)
        )
    out = g.new_zeros(len(routing.ends), g.shape[-1], x.shape[-1])
    for e, a, b in routing.spans:
        torch.mm(g[a:b].t(), x[a:b], out=out[e])
    return out
