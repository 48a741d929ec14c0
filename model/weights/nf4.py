"""NF4: 4-bit codes whose 16 values are quantiles of a normal distribution, in blocks of 64 along the input
dimension.

    w  ~  table[code] * weight_scale

The table follows Dettmers et al., "QLoRA" (2023), appendix E: eight positive and seven negative quantiles
and zero, scaled to [-1, 1]; it is bitsandbytes' table. `weight_scale` is the block's largest absolute
value in BF16 (a quarter of a bit a weight). The low nibble of a byte is the even column, as in
model/weights/nvfp4.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

BLOCK = 64
OFFSET = 0.9677083  # QLoRA's: the outermost quantile, halfway between 1 - 1/30 and 1 - 1/32


@dataclass(frozen=True)
class Packed:
    """`weight` uint8 (..., out, in / 2), `weight_scale` bfloat16 (..., out, in / 64)."""

    weight: torch.Tensor
    weight_scale: torch.Tensor


@cache
def table() -> torch.Tensor:
    """The sixteen values in ascending order, float32; code 7 is zero."""

    def quantiles(count: int) -> torch.Tensor:
        normal_quantiles: torch.Tensor = torch.special.ndtri(
            torch.linspace(OFFSET, 0.5, count, dtype=torch.float64)[:-1]
        )
        return normal_quantiles

    values = torch.cat([quantiles(9), torch.zeros(1, dtype=torch.float64), -quantiles(8)]).sort().values
    return (values / values.max()).float()


@cache
def edges(device: torch.device) -> torch.Tensor:
    """The midpoints between neighbouring values, on `device`, float32 (15,). Cached: with a copy for every
    matrix the processor would wait each time for all earlier work of the GPU.
    """
    return ((table()[1:] + table()[:-1]) / 2).to(device)


def pack(weight: torch.Tensor) -> Packed:
    """Quantises matrices (..., out, in) to the nearest code. Raises ValueError if `in` is no multiple of
    64.
    """
    if weight.shape[-1] % BLOCK:
        raise ValueError(
            f"NF4 needs an input dimension that is a multiple of {BLOCK}, found {weight.shape[-1]}"
        )
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1).to(torch.bfloat16)
    scaled = blocks / scale.float().clamp(min=torch.finfo(torch.bfloat16).tiny)[..., None]
    codes = torch.bucketize(scaled.flatten(-2), edges(weight.device), out_int32=True).to(torch.uint8)
    return Packed(codes[..., 0::2] | (codes[..., 1::2] << 4), scale)


def unpack(packed: Packed) -> torch.Tensor:
    """The values of `packed`, float32 (..., out, in)."""
    codes = torch.stack([packed.weight & 15, packed.weight >> 4], -1).flatten(-2).long()
    values: torch.Tensor = table().to(packed.weight.device)[codes].unflatten(-1, (-1, BLOCK))
    return (values * packed.weight_scale.float()[..., None]).flatten(-2)
