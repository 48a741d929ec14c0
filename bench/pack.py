"""Measures packing and unpacking NVFP4 on a CPU in MB/s, for an expert stack at the real widths, and the
error of both searches: `python -m bench.pack [MATRICES [OUT IN]]`.

A MB is 10^6 bytes of the weights in BF16. `pack` reads these, and `unpack` makes the same weights as float32.
The rows take turns, so that other work on the machine affects all equally. `plain` is the format's definition
in whole-tensor operations; its bits are compared too.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import torch

from model.weights import nvfp4
from model.weights.nvfp4 import FP4_MAX, FP8_MAX, GRID, GROUP, SMALLEST, Packed

if TYPE_CHECKING:
    from collections.abc import Callable

MATRICES, OUT, IN = 16, 1856, 2688
REPEATS = 5
MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between neighbours of the grid
UP_ON_TIE = (0.75, 1.75, 3.5)  # between an odd code and the even one above it


def plain_pack(weight: torch.Tensor) -> Packed:
    weights = weight.float()
    second = nvfp4.global_scale(weights.abs().amax((-2, -1)))
    groups, spread = weights.unflatten(-1, (-1, GROUP)), second[..., None, None]
    scale = groups.abs().amax(-1) / (FP4_MAX * spread)
    scale = (
        torch.where((scale == 0) | scale.isnan(), 1.0, scale).clamp(SMALLEST, FP8_MAX).to(torch.float8_e4m3fn)
    )
    divisor = (scale.float() * spread)[..., None]
    values = torch.where(divisor == 0, 0.0, groups / divisor).flatten(-2)
    size = values.abs()
    code = torch.bucketize(size, torch.tensor(MIDDLES))
    for tie in UP_ON_TIE:
        code += size == tie
    codes = code.to(torch.uint8) | ((values < 0).to(torch.uint8) << 3)
    return Packed(codes[..., 0::2] | (codes[..., 1::2] << 4), scale, second)


def plain_unpack(packed: Packed) -> torch.Tensor:
    codes = torch.stack([packed.weight & 15, packed.weight >> 4], -1).flatten(-2).long()
    grid = torch.tensor([*GRID, *(-value for value in GRID)])
    scale = packed.weight_scale.float() * packed.weight_scale_2[..., None, None]
    groups: torch.Tensor = grid[codes].unflatten(-1, (-1, GROUP)) * scale[..., None]
    return groups.flatten(-2)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the bits are equal, including the sign of zeros."""
    return a.shape == b.shape and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


def main(matrices: int = MATRICES, out: int = OUT, inside: int = IN) -> None:
    torch.manual_seed(0)
    weight = torch.randn(matrices, out, inside, dtype=torch.bfloat16) * 0.02
    megabytes, packed = weight.numel() * 2 / 1e6, nvfp4.pack(weight)
    rows: dict[str, Callable[[], object]] = {
        "pack, plain": lambda: plain_pack(weight),
        "pack, nearest": lambda: nvfp4.pack(weight),
        "pack, mse": lambda: nvfp4.pack(weight, "mse"),
        "unpack, plain": lambda: plain_unpack(packed),
        "unpack": lambda: nvfp4.unpack(packed),
    }
    plain = plain_pack(weight)
    equal = all(
        same(getattr(packed, part), getattr(plain, part)) for part in Packed.__dataclass_fields__
    ) and same(nvfp4.unpack(packed), plain_unpack(plain))
    print(
        f"{matrices} matrices of {out:,} x {inside:,}: {megabytes:,.0f} MB in BF16; torch"
        f" {torch.__version__}; {'equal to plain' if equal else 'DIFFERS from plain'}"
    )
    print(f"{'MB/s':14s} {'threads':>7s} {'best':>7s} {'median':>7s}")
    default_threads = torch.get_num_threads()
    for threads in sorted({1, default_threads}):
        torch.set_num_threads(threads)
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(REPEATS):
            for name, run in rows.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
        for name, times in seconds.items():
            print(
                f"{name:14s} {threads:7d} {megabytes / min(times):7,.0f}"
                f" {megabytes / sorted(times)[REPEATS // 2]:7,.0f}"
            )
    torch.set_num_threads(default_threads)
    nearest, mse = (
        ((nvfp4.unpack(nvfp4.pack(weight, search)) - weight).norm() / weight.float().norm()).item()
        for search in nvfp4.SEARCHES
    )
    print(
        f"relative error on normal weights: nearest {nearest:.4f}, mse {mse:.4f}; of the squared error"
        f" {1 - (mse / nearest) ** 2:.1%} less"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
