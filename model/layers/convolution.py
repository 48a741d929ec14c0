"""The Mamba layers' causal depthwise convolution with SiLU over packed documents, in Triton: one launch
forward, one backward.

    u[t] = bias + sum_k weight[K - 1 - k] x[t - k],  over k up to the tokens before t in its document
    y[t] = u[t] sigmoid(u[t])

The device holds the position of every token in its document, and the number of tokens is an ordinary
argument, so nothing is planned, tuned or compiled for a length. Weight and bias are always frozen, so the
backward computes the gradient of x only:

    dx[t] = sum_k weight[K - 1 - k] g[t + k] s (1 + u (1 - s)),  s = sigmoid(u), all of token t + k
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, no_type_check

import torch

if TYPE_CHECKING:
    from triton import JITFunction

TOKENS, CHANNELS = 16, 128  # of a program's tile
WARPS = 4


def conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, position: torch.Tensor
) -> torch.Tensor:
    """x (tokens, channels), contiguous along channels; weight (channels, K); bias (channels,) or None;
    position int32 (tokens,).

    Returns (tokens, channels) in x's dtype; sums are float32. CUDA only. Raises ValueError if the weight or
    bias is trained, because it would get no gradient.
    """
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(
            "the convolution's weight and bias are frozen in every method, found one that is trained"
        )
    return _Convolution.apply(x, weight.contiguous(), bias, position)


class _Convolution(torch.autograd.Function):
    apply: ClassVar[Callable[..., torch.Tensor]]

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, position: torch.Tensor
    ) -> torch.Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        y = x.new_empty(x.shape)
        _kernels()[0][_grid(x)](
            x,
            weight,
            weight if bias is None else bias,
            position,
            y,
            len(x),
            x.shape[1],
            x.stride(0),
            KERNEL=weight.shape[1],
            BIASED=bias is not None,
            TOKENS=TOKENS,
            CHANNELS=CHANNELS,
            num_warps=WARPS,
        )
        ctx.save_for_backward(x, weight, bias, position)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        x, weight, bias, position = ctx.saved_tensors
        g = g if g.stride(1) == 1 else g.contiguous()
        dx = x.new_empty(x.shape)
        _kernels()[1][_grid(x)](
            g,
            x,
            weight,
            weight if bias is None else bias,
            position,
            dx,
            len(x),
            x.shape[1],
            g.stride(0),
            x.stride(0),
            KERNEL=weight.shape[1],
            BIASED=bias is not None,
            TOKENS=TOKENS,
            CHANNELS=CHANNELS,
            num_warps=WARPS,
        )
        return dx, None, None, None


def _grid(x: torch.Tensor) -> tuple[int, int]:
    return -(-len(x) // TOKENS), -(-x.shape[1] // CHANNELS)


@cache
def _kernels() -> tuple[JITFunction, JITFunction]:
    import triton
    import triton.language as tl

    # Without specialisation on a pack's size: Triton would compile sizes divisible by 16, and 1, separately.
    @triton.jit(do_not_specialize=["tokens"])
    @no_type_check  # Triton's own language
    def conv_forward(
        x,
        weight,
        bias,
        position,
        y,
        tokens,
        channels,
        x_row,
        KERNEL: tl.constexpr,
        BIASED: tl.constexpr,
        TOKENS: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        inside = (t < tokens)[:, None] & (c < channels)[None, :]
        tokens_before = tl.load(position + t, mask=t < tokens, other=0)
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
        if BIASED:
            total += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
        for k in tl.static_range(KERNEL):
            tap = tl.load(weight + c * KERNEL + (KERNEL - 1 - k), mask=c < channels, other=0.0).to(tl.float32)
            value = tl.load(
                x + (t - k)[:, None] * x_row + c[None, :],
                mask=inside & (tokens_before >= k)[:, None],
                other=0.0,
            )
            total += value.to(tl.float32) * tap[None, :]
        total = total * tl.sigmoid(total)
        tl.store(y + t[:, None] * channels + c[None, :], total.to(y.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["tokens"])
    @no_type_check  # Triton's own language
    def conv_backward(
        g,
        x,
        weight,
        bias,
        position,
        dx,
        tokens,
        channels,
        g_row,
        x_row,
        KERNEL: tl.constexpr,
        BIASED: tl.constexpr,
        TOKENS: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        columns = (c < channels)[None, :]
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for j in tl.static_range(KERNEL):
            later = t + j
            tokens_before = tl.load(position + later, mask=later < tokens, other=-1)
            reached = (tokens_before >= j)[:, None] & columns  # token `later` is of t's document
            u = tl.zeros((TOKENS, CHANNELS), tl.float32)
            if BIASED:
                u += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
            for k in tl.static_range(KERNEL):
                tap = tl.load(weight + c * KERNEL + (KERNEL - 1 - k), mask=c < channels, other=0.0).to(
                    tl.float32
                )
                value = tl.load(
                    x + (later - k)[:, None] * x_row + c[None, :],
                    mask=reached & (tokens_before >= k)[:, None],
                    other=0.0,
                )
                u += value.to(tl.float32) * tap[None, :]
            s = tl.sigmoid(u)
            gradient = tl.load(g + later[:, None] * g_row + c[None, :], mask=reached, other=0.0).to(
                tl.float32
            )
            tap = tl.load(weight + c * KERNEL + (KERNEL - 1 - j), mask=c < channels, other=0.0).to(tl.float32)
            total += gradient * s * (1.0 + u * (1.0 - s)) * tap[None, :]
        tl.store(
            dx + t[:, None] * channels + c[None, :],
            total.to(dx.dtype.element_ty),
            mask=(t < tokens)[:, None] & columns,
        )

    return conv_forward, conv_backward
