"""NVFP4: 4-bit floats (E2M1) in groups of 16 along the input dimension, with two levels of scale.

    w  ~  grid[code] * weight_scale * weight_scale_2

`weight_scale_2` (float32, one for a matrix) is amax / (6 * 448): 6 is the largest E2M1 value, 448 the largest E4M3 one.
`weight_scale` (float8 E4M3, one for a group) is the group's amax / (6 * weight_scale_2). Codes are rounded to nearest, ties to
the even code; the low nibble of a byte is the even column. This is the format of NVIDIA's ModelOpt (NVFP4QTensor), bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP = 16
FP4_MAX, FP8_MAX = 6.0, 448.0
SMALLEST = 2.0**-9  # of E4M3, subnormal: a scale of zero would lose its group
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_UP_ON_TIE = (0.75, 1.75, 3.5)  # between an odd code and the even one above it


@dataclass(frozen=True)
class Packed:
    """`weight` uint8 (..., out, in / 2), `weight_scale` float8_e4m3fn (..., out, in / 16), `weight_scale_2` float32 (...)."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_scale_2: torch.Tensor


def global_scale(amax: torch.Tensor) -> torch.Tensor:
    """weight_scale_2 or input_scale from the largest absolute value; float32."""
    return amax.float() / (FP4_MAX * FP8_MAX)


def pack(weight: torch.Tensor) -> Packed:
    """Quantises matrices (..., out, in), each with its own weight_scale_2. Raises ValueError if `in` is no multiple of 16."""
    if weight.shape[-1] % GROUP:
        raise ValueError(f"NVFP4 needs an input dimension that is a multiple of {GROUP}, found {weight.shape[-1]}")
    whole = weight.float()
    second = global_scale(whole.abs().amax((-2, -1)))
    groups = whole.unflatten(-1, (-1, GROUP))
    spread = second[..., None, None]
    scale = groups.abs().amax(-1) / (FP4_MAX * spread)
    # A group of zeros (0, or 0/0 in a matrix of zeros) gets scale 1: its codes are 0 whatever the scale.
    scale = torch.where((scale == 0) | scale.isnan(), 1.0, scale).clamp(SMALLEST, FP8_MAX).to(torch.float8_e4m3fn)
    divisor = scale.float() * spread
    scaled = torch.where(divisor[..., None] == 0, 0.0, groups / divisor[..., None]).flatten(-2)
    codes = encode(scaled)
    return Packed(codes[..., 0::2] | (codes[..., 1::2] << 4), scale, second)


def encode(values: torch.Tensor) -> torch.Tensor:
    """4-bit codes (uint8, one a value) of values on the E2M1 scale; beyond +-6 they saturate."""
    size = values.abs()
    code = torch.bucketize(size, torch.tensor(_MIDDLES, device=values.device))
    for tie in _UP_ON_TIE:
        code += size == tie
    return code.to(torch.uint8) | ((values < 0).to(torch.uint8) << 3)


def unpack(packed: Packed) -> torch.Tensor:
    """The matrices that `packed` stands for, float32 (..., out, in)."""
    low, high = packed.weight & 15, packed.weight >> 4
    codes = torch.stack([low, high], -1).flatten(-2).long()
    grid = torch.tensor([*GRID, *(-value for value in GRID)], device=packed.weight.device)
    scale = packed.weight_scale.float() * packed.weight_scale_2[..., None, None]
    return (grid[codes].unflatten(-1, (-1, GROUP)) * scale[..., None]).flatten(-2)
