"""Decodes packed weights to dense ones on a GPU: one Triton kernel for both 4-bit forms, portable from sm_80
to sm_121.

It reads each code and scale once and writes the dense stack, so it runs at memory speed. A program has one
row, so that no element needs a division to find its position: two integer divisions per element would take
eight times the memory's time. NVFP4's scales are read as bytes and looked up, because Triton converts E4M3
only from sm_89 on.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, no_type_check

import torch

from model.weights import nf4, nvfp4

if TYPE_CHECKING:
    from triton import JITFunction

TILE = 512  # bytes of codes (1,024 columns) that a program decodes at once


def stack(packed: nf4.Packed | nvfp4.Packed, out: torch.Tensor) -> torch.Tensor:
    """Decodes packed matrices (experts, out, ...) into `out`, a view (experts, out, in) with contiguous rows.
    CUDA only.
    """
    double = isinstance(packed, nvfp4.Packed)
    values, scales = _tables("nvfp4" if double else "nf4", str(out.device))
    experts, height, width = packed.weight.shape
    _kernel()[(experts * height,)](
        packed.weight,
        packed.weight_scale.view(torch.uint8) if double else packed.weight_scale,
        packed.weight_scale_2 if isinstance(packed, nvfp4.Packed) else values,
        values,
        scales,
        out,
        width,
        height,
        out.stride(0),
        out.stride(1),
        GROUP=nvfp4.GROUP if double else nf4.BLOCK,
        DOUBLE=double,
        TILE=TILE,
        num_warps=4,
    )
    return out


@cache
def _tables(form: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The value of each code, and of each byte of an E4M3 scale; float32."""
    values = nf4.table() if form == "nf4" else torch.tensor([*nvfp4.GRID, *(-value for value in nvfp4.GRID)])
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return values.to(device), scales.to(device)


@cache
def _kernel() -> JITFunction:
    import triton
    import triton.language as tl

    @triton.jit
    @no_type_check  # Triton's own language
    def kernel(
        codes,
        scales,
        seconds,
        values,
        bytes_of_scale,
        out,
        width,
        height,
        out_matrix,
        out_row,
        GROUP: tl.constexpr,
        DOUBLE: tl.constexpr,
        TILE: tl.constexpr,
    ):
        row = tl.program_id(0)  # row of all matrices stacked
        matrix = row // height
        codes += row.to(tl.int64) * width
        scales += row.to(tl.int64) * (width // (GROUP // 2))
        out += matrix.to(tl.int64) * out_matrix + (row - matrix * height).to(tl.int64) * out_row
        if DOUBLE:
            second = tl.load(seconds + matrix)
        for start in range(0, width, TILE):
            position = start + tl.arange(0, TILE)
            code = tl.load(codes + position, mask=position < width, other=0).to(tl.int32)
            # The two columns of a byte have the same scale, because groups have an even number of columns.
            scale = tl.load(scales + position // (GROUP // 2), mask=position < width, other=0)
            factor = tl.load(bytes_of_scale + scale.to(tl.int32)) * second if DOUBLE else scale.to(tl.float32)
            columns = tl.interleave(
                tl.load(values + (code & 15)) * factor, tl.load(values + (code >> 4)) * factor
            )
            column = 2 * start + tl.arange(0, 2 * TILE)
            tl.store(out + column, columns.to(out.dtype.element_ty), mask=column < 2 * width)

    return kernel
