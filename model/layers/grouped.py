"""Matrix products of tokens that are sorted by expert: one product per expert, over the rows that were
routed to it.

On a GPU in BF16 all experts go in one launch: of `torch.nn.functional.grouped_mm` where torch has a kernel
for it, else of our own (model/layers/tiles.py). Elsewhere a loop over the experts that have rows. None is
differentiable here: model/layers/experts.py states its own backward, so that no dense weight gradient can
arise.
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
)  # major compute capabilities: on any other torch multiplies expert after expert
ALIGNMENT = 8  # BF16 numbers in the 16 bytes that every row of a grouped product has to be a multiple of


@dataclass(frozen=True)
class Routing:
    """How the rows of (tokens, choices) are sorted by expert. With S = tokens * choices:

    `order` int64 (S,): place in the flattened (tokens, choices) of each sorted row; `inverse` int64 (S,):
    the other way; `token` int64 (S,): the token of each sorted row; `ends` int32 (experts,): the row after
    each expert's last.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    token: torch.Tensor
    ends: torch.Tensor

    @staticmethod
    def of(index: torch.Tensor, experts: int) -> Routing:
        """From the router's choice, int64 (tokens, choices)."""
        # A byte a key is one pass of a radix sort; and nothing here asks the device for a size, as bincount
        # would.
        flat = index.flatten().to(torch.uint8 if experts <= 256 else torch.int32)
        keys, order = flat.sort(stable=True)
        # A scatter and not a second sort: the inverse of a permutation.
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        ends = torch.searchsorted(
            keys, torch.arange(experts, device=keys.device).to(keys.dtype), right=True, out_int32=True
        )
        return Routing(order, inverse, order // index.shape[-1], ends)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """Expert, its first row and the row after its last, of every expert that has rows. Waits for the
        device.
        """
        ends = self.ends.tolist()
        return [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if b > a]


def in_one_launch(x: torch.Tensor) -> bool:
    """Whether products with `x` go in one launch."""
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
