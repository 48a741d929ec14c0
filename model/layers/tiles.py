"""Grouped products in Triton, for GPUs on which torch loops over the experts: all but Hopper and data-centre
Blackwell.

torch.nn.functional.grouped_mm has one kernel for sm_90 and one for sm_100. On a GB10 (sm_121), an A100 or a
workstation card it multiplies expert after expert and waits for the device to report where each begins. Here
a tile is a block of one expert's rows. The device finds its expert and rows, so nothing waits.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, no_type_check

import torch

if TYPE_CHECKING:
    from triton import JITFunction

ROWS, COLUMNS, DEPTH = 128, 128, 64  # of a tile of the result, and of one step of its product
WARPS, STAGES = 4, 3  # threads in 32s of a tile, and tiles in flight
NARROW = 16  # least width of a tensor core's product; for low-rank products


def tiles(ends: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expert, first row and end of each tile's rows, int32 (total // ROWS + experts,). Surplus tiles have no
    rows.

    `ends` int32 (experts,): the row after each expert's last; `total`: number of rows. The number of tiles is
    an upper bound, so no size is read from the device.
    """
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    counts = (ends - starts + ROWS - 1) // ROWS
    last = counts.cumsum(0)
    number = torch.arange(total // ROWS + len(ends), device=ends.device)
    expert = torch.searchsorted(last, number, right=True)
    real = expert < len(ends)
    expert = expert.clamp(max=len(ends) - 1)
    first = starts[expert] + (number - (last - counts)[expert]) * ROWS
    return (
        expert.to(torch.int32),
        torch.where(real, first, 0).to(torch.int32),
        torch.where(real, ends[expert], 0).to(torch.int32),
    )


def product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`x[rows of e] @ weight[e].T`: (S, in), (experts, out, in) -> (S, out). Any strides."""
    return _multiply(x, weight, ends, weight.shape[1], weight.stride(1), weight.stride(2))


def input_gradient(g: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`g[rows of e] @ weight[e]`: (S, out), (experts, out, in) -> (S, in). Any strides."""
    return _multiply(g, weight, ends, weight.shape[2], weight.stride(2), weight.stride(1))


def _multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    columns: int,
    column_stride: int,
    depth_stride: int,
) -> torch.Tensor:
    expert, first, end = tiles(ends, len(x))
    out = x.new_empty(len(x), columns)
    # Columns run fastest: programs that run at the same time share an expert's rows and matrix, and both stay
    # in the L2 cache.
    wide = COLUMNS if columns > NARROW else NARROW
    _kernels()[0][(-(-columns // wide), len(expert))](
        x,
        weight,
        out,
        expert,
        first,
        end,
        columns,
        x.shape[1],
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        column_stride,
        depth_stride,
        out.stride(0),
        ROWS=ROWS,
        COLUMNS=wide,
        DEPTH=DEPTH,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


def outer(g: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`g[rows of e].T @ x[rows of e]`: (S, out), (S, in) -> (experts, out, in); zeros for idle experts.
    Any strides.
    """
    height, width = g.shape[1], x.shape[1]
    out = g.new_empty(len(ends), height, width)
    high, wide = (COLUMNS if size > NARROW else NARROW for size in (height, width))
    _kernels()[1][(len(ends), -(-height // high), -(-width // wide))](
        g,
        x,
        out,
        ends,
        height,
        width,
        g.stride(0),
        g.stride(1),
        x.stride(0),
        x.stride(1),
        HIGH=high,
        WIDE=wide,
        DEPTH=DEPTH,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


@cache
def _kernels() -> tuple[JITFunction, JITFunction]:
    import triton
    import triton.language as tl

    @triton.jit
    @no_type_check  # Triton's own language
    def multiply(
        x,
        weight,
        out,
        experts,
        firsts,
        ends,
        columns,
        depth,
        x_row,
        x_depth,
        w_expert,
        w_column,
        w_depth,
        out_row,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
    ):
        tile = tl.program_id(1)
        first, end = tl.load(firsts + tile), tl.load(ends + tile)
        if first < end:
            row = (first + tl.arange(0, ROWS)).to(tl.int64)
            column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
            weight += tl.load(experts + tile).to(tl.int64) * w_expert
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(0, depth, DEPTH):
                inner = start + tl.arange(0, DEPTH)
                a = tl.load(
                    x + row[:, None] * x_row + inner[None, :] * x_depth,
                    mask=(row[:, None] < end) & (inner[None, :] < depth),
                    other=0.0,
                )
                b = tl.load(
                    weight + inner[:, None] * w_depth + column[None, :] * w_column,
                    mask=(inner[:, None] < depth) & (column[None, :] < columns),
                    other=0.0,
                )
                total = tl.dot(a, b, total)
            tl.store(
                out + row[:, None] * out_row + column[None, :],
                total.to(out.dtype.element_ty),
                mask=(row[:, None] < end) & (column[None, :] < columns),
            )

    @triton.jit
    @no_type_check  # Triton's own language
    def outer(
        g,
        x,
        out,
        ends,
        height,
        width,
        g_row,
        g_column,
        x_row,
        x_column,
        HIGH: tl.constexpr,
        WIDE: tl.constexpr,
        DEPTH: tl.constexpr,
    ):
        expert = tl.program_id(0)
        end = tl.load(ends + expert)
        first = 0
        if expert > 0:
            first = tl.load(ends + expert - 1)
        high = tl.program_id(1) * HIGH + tl.arange(0, HIGH)
        wide = tl.program_id(2) * WIDE + tl.arange(0, WIDE)
        total = tl.zeros((HIGH, WIDE), tl.float32)
        for start in range(first, end, DEPTH):
            row = (start + tl.arange(0, DEPTH)).to(tl.int64)
            a = tl.load(
                g + row[None, :] * g_row + high[:, None] * g_column,
                mask=(row[None, :] < end) & (high[:, None] < height),
                other=0.0,
            )
            b = tl.load(
                x + row[:, None] * x_row + wide[None, :] * x_column,
                mask=(row[:, None] < end) & (wide[None, :] < width),
                other=0.0,
            )
            total = tl.dot(a, b, total)
        place = expert.to(tl.int64) * height * width + high[:, None] * width + wide[None, :]
        tl.store(
            out + place,
            total.to(out.dtype.element_ty),
            mask=(high[:, None] < height) & (wide[None, :] < width),
        )

    return multiply, outer
