"""The values of a matrix after the export's NVFP4 rounding, without its packed form; training can run through
it.

In torch (model/weights/nvfp4.py, pack and unpack) this takes some thirty passes over memory; on a GPU it is
one kernel with the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, no_type_check

import torch

from model.weights import nvfp4

if TYPE_CHECKING:
    from triton import JITFunction

TILE = 1024  # columns a program rounds at once


def rounded(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of matrices (..., out, in) after NVFP4 quantisation, in `dtype`. Raises ValueError if `in`
    is no multiple of 16.
    """
    if not matrices.is_cuda:
        return nvfp4.unpack(nvfp4.pack(matrices)).to(dtype)
    if matrices.shape[-1] % nvfp4.GROUP:
        raise ValueError(
            f"NVFP4 needs an input dimension that is a multiple of {nvfp4.GROUP}, found {matrices.shape[-1]}"
        )
    source = matrices.contiguous()
    second = nvfp4.global_scale(source.abs().amax((-2, -1)).float()).contiguous()
    out = torch.empty_like(source, dtype=dtype)
    height, width = source.shape[-2:]
    _kernel()[(source.numel() // width,)](
        source,
        second,
        out,
        width,
        height,
        GROUP=nvfp4.GROUP,
        FP4_MAX=nvfp4.FP4_MAX,
        FP8_MAX=nvfp4.FP8_MAX,
        SMALLEST=nvfp4.SMALLEST,
        TILE=TILE,
        num_warps=4,
    )
    return out


@cache
def _kernel() -> JITFunction:
    import triton
    import triton.language as tl

    @triton.jit
    @no_type_check  # Triton's own language
    def kernel(
        source,
        seconds,
        out,
        width,
        height,
        GROUP: tl.constexpr,
        FP4_MAX: tl.constexpr,
        FP8_MAX: tl.constexpr,
        SMALLEST: tl.constexpr,
        TILE: tl.constexpr,
    ):
        row = tl.program_id(0)
        source += row.to(tl.int64) * width
        out += row.to(tl.int64) * width
        second = tl.load(seconds + row // height)
        for start in range(0, width, TILE):
            column = start + tl.arange(0, TILE // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            value = tl.load(source + column, mask=column < width, other=0.0).to(tl.float32)
            size = tl.abs(value)
            scale = tl.div_rn(tl.max(size, 1), FP4_MAX * second)
            scale = tl.where((scale == 0.0) | (scale != scale), 1.0, scale)  # a group, or a matrix, of zeros
            scale = tl.minimum(tl.maximum(scale, SMALLEST), FP8_MAX)
            # Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even, because float32
            # has no fractions there. E4M3: three bits behind the leading one, and never finer than 2^-9.
            power = ((scale.to(tl.int32, bitcast=True) >> 23) << 23).to(tl.float32, bitcast=True)
            step = tl.maximum(power * 0.125, SMALLEST)
            scale = ((scale / step + 12582912.0) - 12582912.0) * step
            divisor = (scale * second)[:, None]
            unit = tl.where(divisor == 0.0, 0.0, tl.div_rn(size, tl.where(divisor == 0.0, 1.0, divisor)))
            # E2M1: steps of 0.5 up to 2, of 1 up to 4, of 2 up to 6. An even code is an even multiple of its
            # step.
            step2 = tl.where(unit < 2.0, 0.5, tl.where(unit < 4.0, 1.0, 2.0))
            code = tl.minimum(((unit / step2 + 12582912.0) - 12582912.0) * step2, FP4_MAX)
            rounded_value = tl.where(value < 0.0, -code, code) * divisor
            tl.store(out + column, rounded_value.to(out.dtype.element_ty), mask=column < width)

    return kernel
