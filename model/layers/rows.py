"""Operations on rows of tokens between the experts' products: plain torch, or one Triton kernel each on a
GPU.

Each is bound by memory bandwidth; single torch operations would read and write the same numbers three to
eight times. `room` is a number of extra columns in the result that are left unfilled. A product's low-rank
part goes there, so that base and change are one product (model/layers/experts.py).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, no_type_check

import torch

if TYPE_CHECKING:
    from triton import JITFunction


def gather(x: torch.Tensor, token: torch.Tensor, room: int) -> torch.Tensor:
    """`x[token]` in the first columns of (S, width + room); x (tokens, width), token int64 (S,)."""
    width = x.shape[1]
    out = x.new_empty(len(token), width + room)
    if x.is_cuda:
        x = x.contiguous()  # the gradient of a sum is a number expanded with stride 0
        _kernels()["gather"][(len(token),)](
            x, token, out, width, x.stride(0), out.stride(0), BLOCK=_block(width)
        )
    else:
        out[:, :width] = x[token]
    return out


def relu_squared(u: torch.Tensor, room: int) -> torch.Tensor:
    """`relu(u)^2` in the first columns of (S, width + room); u (S, width)."""
    width = u.shape[1]
    out = u.new_empty(len(u), width + room)
    if u.is_cuda:
        _kernels()["relu_squared"][(len(u),)](u, out, width, u.stride(0), out.stride(0), BLOCK=_block(width))
    else:
        out[:, :width] = u.relu().square_()
    return out


def relu_squared_backward(
    dh: torch.Tensor, u: torch.Tensor, p: torch.Tensor, room: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward of `p * down(relu(u)^2)`. `dh`: the gradient behind the down projection, before it is
    multiplied by the share p.

    Returns the gradient of u, `dh * p * 2 relu(u)`, in the first columns of (S, width + room), and the
    gradient of p, `<dh, relu(u)^2>`, float32 (S,). dh, u (S, width); p float32 (S,).
    """
    width = u.shape[1]
    out = u.new_empty(len(u), width + room)
    if u.is_cuda:
        dp = torch.empty_like(p)
        _kernels()["relu_squared_backward"][(len(u),)](
            dh, u, p, out, dp, width, dh.stride(0), u.stride(0), out.stride(0), BLOCK=_block(width)
        )
        return out, dp
    relu = u.relu()
    dp = (dh * relu.square()).sum(-1, dtype=torch.float32)
    out[:, :width] = relu.mul_(dh).mul_(2 * p[:, None])
    return out, dp


def combine(d: torch.Tensor, inverse: torch.Tensor, share: torch.Tensor | None, choices: int) -> torch.Tensor:
    """`sum_k share[t, k] * d[inverse[t * choices + k]]`, (tokens, width); without `share` the plain sum. Sums
    are float32.

    It gathers and sums instead of scattering and adding, so the order of the sum is always the same.
    """
    tokens, width = len(inverse) // choices, d.shape[1]
    if d.is_cuda:
        out = d.new_empty(tokens, width)
        _kernels()["combine"][(tokens,)](
            d,
            inverse,
            d if share is None else share.contiguous(),
            out,
            width,
            d.stride(0),
            CHOICES=choices,
            SHARED=share is not None,
            BLOCK=_block(width),
        )
        return out
    rows = d[inverse].view(tokens, choices, width)
    return rows.sum(1) if share is None else (rows * share[..., None]).sum(1).to(d.dtype)


def _block(width: int) -> int:
    """Columns of a row that a program handles at once: all of them, up to 4,096."""
    return min(4096, 1 << (width - 1).bit_length())


@cache
def _kernels() -> dict[str, JITFunction]:
    import triton
    import triton.language as tl

    @triton.jit
    @no_type_check  # Triton's own language
    def gather(x, token, out, width, x_row, out_row, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        source = tl.load(token + row)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(x + source * x_row + column, mask=column < width, other=0.0)
            tl.store(out + row * out_row + column, value, mask=column < width)

    @triton.jit
    @no_type_check  # Triton's own language
    def relu_squared(u, out, width, u_row, out_row, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.maximum(
                tl.load(u + row * u_row + column, mask=column < width, other=0.0).to(tl.float32), 0.0
            )
            tl.store(
                out + row * out_row + column, (value * value).to(out.dtype.element_ty), mask=column < width
            )

    @triton.jit
    @no_type_check  # Triton's own language
    def relu_squared_backward(dh, u, p, out, dp, width, dh_row, u_row, out_row, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        share = tl.load(p + row)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            gradient = tl.load(dh + row * dh_row + column, mask=column < width, other=0.0).to(tl.float32)
            relu = tl.maximum(
                tl.load(u + row * u_row + column, mask=column < width, other=0.0).to(tl.float32), 0.0
            )
            total += gradient * relu * relu
            tl.store(
                out + row * out_row + column,
                (gradient * share * 2.0 * relu).to(out.dtype.element_ty),
                mask=column < width,
            )
        tl.store(dp + row, tl.sum(total))

    @triton.jit
    @no_type_check  # Triton's own language
    def combine(
        d, inverse, share, out, width, d_row, CHOICES: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), tl.float32)
            for k in tl.static_range(CHOICES):
                source = tl.load(inverse + row * CHOICES + k)
                value = tl.load(d + source * d_row + column, mask=column < width, other=0.0).to(tl.float32)
                if SHARED:
                    value *= tl.load(share + row * CHOICES + k)
                total += value
            tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=column < width)

    return {
        "gather": gather,
        "relu_squared": relu_squared,
        "relu_squared_backward": relu_squared_backward,
        "combine": combine,
    }
