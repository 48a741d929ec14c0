"""The routed experts: tokens are sorted once, then each projection is one grouped product, forward and
backward.

For token t with choices e and shares p (the router's, float32):

    y[t] = sum_e p[t, e] * down_e(relu(up_e(x[t]))^2)

with up and down as in model/layers/projection.py: W x + scale * B (A x). Both terms are one product: the rows
carry A x behind x, and the decoded weights carry scale * B behind W. The backward is written here and not
left to autograd. It saves the input and packed weights (and the output of the up projection), computes the
gradients of x, of the shares and of A and B, and never forms a gradient of W. The gradient of a share needs
no second down projection: with g the output's gradient, <g, W_down h> = <g W_down, h>.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from model.layers import rows
from model.layers.grouped import ALIGNMENT, Routing, in_one_launch, input_gradient, outer, product
from model.layers.projection import Projection

if TYPE_CHECKING:
    from model.layers.structure import Stacks

NAME = "annie"  # among transformers' experts implementations
STACKS = ("up_proj", "down_proj")  # their names in the native class


def register() -> None:
    """Registers this as transformers' experts implementation `annie`; a second call changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)


def forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' interface: (tokens, hidden), int64 (tokens, choices), (tokens, choices) -> (tokens,
    hidden).

    `module.up_proj` and `.down_proj` are Projections.
    """
    up, down = stacks(module)
    if not isinstance(up, Projection):
        raise TypeError(
            f"experts implementation {NAME!r} works on Projections, found {type(up).__name__}: load the model"
            " with model.assemble"
        )
    return _Experts.apply(
        hidden_states,
        Routing.of(top_k_index, up.experts),
        top_k_weights,
        *up.trainable_factors,
        *down.trainable_factors,
        up,
        down,
    )


def stacks(module: nn.Module) -> tuple[Projection, Projection]:
    """The up and the down projections of a module of routed experts, in the order of STACKS."""
    experts = cast("Stacks", module)
    return experts.up_proj, experts.down_proj


def holds_stacks(module: nn.Module) -> bool:
    """Whether a module holds routed experts. A shared expert is a module of two plain Projections."""
    up = getattr(module, STACKS[0], None)
    return isinstance(up, Projection) and up.experts > 1


def run(
    x: torch.Tensor, routing: Routing, share: torch.Tensor, up: Projection, down: Projection
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (tokens, hidden), and the output of the up projection (tokens * choices, intermediate) in
    sorted rows.
    """
    u = _multiply(up, rows.gather(x, routing.token, _low_rank_columns(up, x)), routing)
    d = _multiply(down, rows.relu_squared(u, _low_rank_columns(down, x)), routing)
    return rows.combine(d, routing.inverse, share, share.shape[1]), u


def gradients(
    g: torch.Tensor,
    x: torch.Tensor,
    routing: Routing,
    share: torch.Tensor,
    u: torch.Tensor | None,
    up: Projection,
    down: Projection,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, share, and A and B of both projections (None without a change), given the output's
    gradient `g`.

    `u`: the second result of `run`; None computes it again.
    """
    hidden, width = up.in_features, up.out_features
    p = share.flatten()[routing.order].float()
    source = rows.gather(x, routing.token, _low_rank_columns(up, x))
    if u is None:
        u = _multiply(up, source, routing)
    else:
        _fill_low_rank(up, source, routing)
    dy = rows.gather(g, routing.token, _low_rank_columns(down, x))
    dh = _input_gradient(down, dy, routing)
    da_down = db_down = da_up = db_up = None
    if down.rank:
        h = rows.relu_squared(u, _low_rank_columns(down, x))
        _fill_low_rank(down, h, routing)
        # A share multiplies whole rows, so it is applied to the narrower factor of each product.
        da_down = _without_rank_padding(
            outer((dy[:, hidden:] * p[:, None]).to(x.dtype), h[:, :width], routing), down.rank, 1
        )
        db_down = _without_rank_padding(
            outer(dy[:, :hidden], (h[:, width:] * (down.scale * p[:, None])).to(x.dtype), routing),
            down.rank,
            2,
        )
        del h
    del dy
    du, dp = rows.relu_squared_backward(dh, u, p, _low_rank_columns(up, x))
    del dh, u
    dx = rows.combine(_input_gradient(up, du, routing), routing.inverse, None, share.shape[1])
    if up.rank:
        da_up = _without_rank_padding(
            outer(du[:, width:].contiguous(), source[:, :hidden], routing), up.rank, 1
        )
        db_up = _without_rank_padding(
            outer(du[:, :width], source[:, hidden:] * up.scale, routing), up.rank, 2
        )
    return dx, dp[routing.inverse].view_as(share).to(share.dtype), da_up, db_up, da_down, db_down


class _Experts(torch.autograd.Function):
    apply: ClassVar[Callable[..., torch.Tensor]]

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        routing: Routing,
        share: torch.Tensor,
        up_a: torch.Tensor | None,
        up_b: torch.Tensor | None,
        down_a: torch.Tensor | None,
        down_b: torch.Tensor | None,
        up: Projection,
        down: Projection,
    ) -> torch.Tensor:
        y, u = run(x, routing, share, up, down)
        ctx.routing, ctx.up, ctx.down = routing, up, down
        ctx.save_for_backward(x, share, u)
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, share, u = ctx.saved_tensors
        dx, dshare, *dfactors = gradients(g, x, ctx.routing, share, u, ctx.up, ctx.down)
        return dx, None, dshare, *dfactors, None, None


def _rank_multiple(x: torch.Tensor) -> int:
    return ALIGNMENT if in_one_launch(x) else 1


def _low_rank_columns(projection: Projection, x: torch.Tensor) -> int:
    """Number of columns for the low-rank part: the rank, padded to what grouped products need."""
    return projection.rank + -projection.rank % _rank_multiple(x)


def _fill_low_rank(projection: Projection, source: torch.Tensor, routing: Routing) -> None:
    """Writes A x into the last columns of rows (S, in + room) whose first columns hold x."""
    if projection.rank:
        inside = projection.in_features
        source[:, inside:] = product(
            source[:, :inside], projection.factors(source.dtype, _rank_multiple(source))[0], routing
        )


def _multiply(projection: Projection, source: torch.Tensor, routing: Routing) -> torch.Tensor:
    """(S, in + room) -> (S, out): base and change in one product. Fills the last columns of `source`."""
    _fill_low_rank(projection, source, routing)
    if projection.rank and not projection.rounded:
        return product(source, projection.with_b_columns(_rank_multiple(source)), routing)
    return product(source[:, : projection.in_features], projection.forward_weights(), routing)


def _input_gradient(projection: Projection, dy: torch.Tensor, routing: Routing) -> torch.Tensor:
    """(S, out + room) -> (S, in): the gradient of a projection's input. Fills the last columns of `dy` with
    the gradient of A x.
    """
    out = projection.out_features
    if projection.rank:
        dy[:, out:] = input_gradient(
            dy[:, :out], projection.factors(dy.dtype, _rank_multiple(dy))[1], routing
        )
        if not projection.rounded:
            return input_gradient(dy, projection.with_a_rows(_rank_multiple(dy)), routing)
    return input_gradient(dy[:, :out], projection.forward_weights(), routing)


def _without_rank_padding(gradient: torch.Tensor, rank: int, dimension: int) -> torch.Tensor:
    """The gradient of a factor in float32, without the rows or columns that padded its rank."""
    return gradient.narrow(dimension, 0, rank).float()
