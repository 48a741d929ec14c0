"""RMS norm of whole rows on a GPU: one kernel forward and one backward, where single torch operations would
read and write ten times.

    y = weight * x / sqrt(mean(x^2) + eps),  in float32, rounded once

The weight is always frozen here, so the backward computes the gradient of x only.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, no_type_check

import torch
from torch import nn

if TYPE_CHECKING:
    from triton import JITFunction

    from model.layers.structure import Norm


def attach(norm: nn.Module) -> None:
    """Binds `forward` to one NemotronHRMSNorm."""
    norm.forward = types.MethodType(forward, norm)


def forward(self: Norm, hidden_states: torch.Tensor) -> torch.Tensor:
    """(..., width) to the same shape and dtype. On a CPU the class's own forward runs."""
    if not hidden_states.is_cuda:
        output: torch.Tensor = type(self).forward(self, hidden_states)
        return output
    return _RMSNorm.apply(hidden_states, self.weight.detach(), self.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    apply: ClassVar[Callable[..., torch.Tensor]]

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y, inverse = torch.empty_like(rows), torch.empty(len(rows), dtype=torch.float32, device=x.device)
        _kernels()[0][(len(rows),)](
            rows,
            weight,
            y,
            inverse,
            rows.shape[1],
            rows.stride(0),
            eps,
            BLOCK=1 << (rows.shape[1] - 1).bit_length(),
        )
        ctx.save_for_backward(x, weight, inverse)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        rows, g_rows = x.reshape(-1, x.shape[-1]).contiguous(), g.reshape(-1, x.shape[-1]).contiguous()
        dx = torch.empty_like(rows)
        _kernels()[1][(len(rows),)](
            g_rows,
            rows,
            weight,
            inverse,
            dx,
            rows.shape[1],
            g_rows.stride(0),
            rows.stride(0),
            BLOCK=1 << (rows.shape[1] - 1).bit_length(),
        )
        return dx.view(x.shape), None, None


@cache
def _kernels() -> tuple[JITFunction, JITFunction]:
    import triton
    import triton.language as tl

    @triton.jit
    @no_type_check  # Triton's own language
    def norm_forward(x, weight, y, inverse, width, x_row, eps, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        value = tl.load(x + row * x_row + column, mask=column < width, other=0.0).to(tl.float32)
        factor = 1.0 / tl.sqrt(tl.sum(value * value) / width + eps)
        scaled = value * factor * tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(y + row * width + column, scaled.to(y.dtype.element_ty), mask=column < width)
        tl.store(inverse + row, factor)

    @triton.jit
    @no_type_check  # Triton's own language
    def norm_backward(g, x, weight, inverse, dx, width, g_row, x_row, BLOCK: tl.constexpr):
        # d/dx of w x r with r = (mean x^2 + eps)^(-1/2):  r (w g) - x r^3 <w g, x> / width
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        value = tl.load(x + row * x_row + column, mask=column < width, other=0.0).to(tl.float32)
        gradient = tl.load(g + row * g_row + column, mask=column < width, other=0.0).to(tl.float32)
        gradient *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        factor = tl.load(inverse + row)
        projected = tl.sum(gradient * value) * factor * factor * factor / width
        tl.store(
            dx + row * width + column,
            (gradient * factor - value * projected).to(dx.dtype.element_ty),
            mask=column < width,
        )

    return norm_forward, norm_backward
