"""NVFP4: 4-bit floats (E2M1) in groups of 16 along the input dimension, with two levels of scale.

    w  ~  grid[code] * weight_scale * weight_scale_2

`weight_scale_2` (float32, one for a matrix) is amax / (6 * 448): 6 is the largest E2M1 value, 448 the
largest E4M3 one. `weight_scale` (float8 E4M3, one for a group) is the group's amax / (6 * weight_scale_2).
Codes are rounded to nearest, ties to the even code; the low nibble of a byte is the even column. This is
the format of NVIDIA's ModelOpt (NVFP4QTensor), bit for bit.

A search may choose another `weight_scale`, with which the group's squared error is smaller; a reader need
not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

GROUP = 16
FP4_MAX, FP8_MAX = 6.0, 448.0
SMALLEST = 2.0**-9  # of E4M3, subnormal: a scale of zero would lose its group
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SEARCHES = ("nearest", "mse")
CHUNK = 2**18  # weights that a CPU handles at once: few enough that temporaries stay in its cache
_SCALE_BYTES = (0x01, 0x7E)  # of SMALLEST and FP8_MAX; positive E4M3 numbers have the order of their bytes
# a smaller error must be smaller by more than the rounding error of its float32 sum (about 2^-20)
_BETTER = 1 - 2.0**-16


@dataclass(frozen=True)
class Packed:
    """`weight` uint8 (..., out, in / 2), `weight_scale` float8_e4m3fn (..., out, in / 16),
    `weight_scale_2` float32 (...).
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_scale_2: torch.Tensor


def global_scale(amax: torch.Tensor) -> torch.Tensor:
    """weight_scale_2 or input_scale from the largest absolute value; float32."""
    # Divided by a tensor: for a plain number a GPU multiplies by the reciprocal, which can differ by a bit
    # from other devices. The device fills the tensor, because copying a number to it is refused during the
    # capture of a CUDA graph.
    return amax.float() / torch.full_like(amax, FP4_MAX * FP8_MAX, dtype=torch.float32)


@torch.no_grad()
def pack(weight: torch.Tensor, search: str = "nearest") -> Packed:
    """Quantises matrices (..., out, in), each with its own weight_scale_2.

    `search` says how the scale of a group is found: "nearest" maps the group's amax to 6, as ModelOpt
    does; "mse" tries six scales and takes the one with the least squared error (`least_error_scale`).
    Both use the same weight_scale_2, so "mse" makes no group worse than "nearest", and weights that are
    on the grid stay as they are. The price: if the amax of a group is above 2/3 of its matrix's, it cannot
    be mapped to 4, because that scale would be beyond 448 and is clamped. Four Over Six makes room with
    amax / (6 * 256). On normal weights at real widths 0.8 % of groups are so large, and the error is the
    same to 0.1 %.

    Raises ValueError if `in` is no multiple of 16, or for a search that does not exist.
    """
    *front, width = weight.shape
    if width % GROUP:
        raise ValueError(f"NVFP4 needs an input dimension that is a multiple of {GROUP}, found {width}")
    if search not in SEARCHES:
        raise ValueError(
            f"NVFP4 scales are found by one of the searches {', '.join(SEARCHES)}; found {search!r}"
        )
    groups = weight.reshape(-1, GROUP)
    # Non-negative floats have the order of their bits, and torch takes the maximum of 16 integers in half the
    # time.
    amax = _by_chunks(lambda chunk: chunk.float().abs().view(torch.int32).amax(-1), groups).view(
        torch.float32
    )
    second = global_scale(amax.view(*front[:-1], -1).amax(-1))
    group_second = second[..., None, None].expand(*front, width // GROUP).reshape(-1)
    scale = block_scale(amax, group_second, FP4_MAX)
    if search == "mse":
        scale = _by_chunks(least_error_scale, groups, amax, group_second)
    divisor = scale.float() * group_second
    divisor.masked_fill_(divisor == 0, torch.inf)  # smaller than any float32: such weights become 0
    codes = _by_chunks(
        lambda chunk, chunk_divisor: _two_to_a_byte(encode(chunk.float() / chunk_divisor[:, None])),
        groups,
        divisor,
    )
    return Packed(codes.view(*front, width // 2), scale.view(*front, width // GROUP), second)


def block_scale(amax: torch.Tensor, second: torch.Tensor, target: float) -> torch.Tensor:
    """The float8_e4m3fn scale that maps a group's amax to `target` on the E2M1 scale. `amax` and `second`
    (weight_scale_2): float32 (groups).
    """
    scale = amax / (target * second)
    # A group of zeros (0, or 0/0 in a matrix of zeros) gets scale 1: its codes are 0 whatever the scale.
    return (
        torch.where((scale == 0) | scale.isnan(), 1.0, scale)
        .clamp_(SMALLEST, FP8_MAX)
        .to(torch.float8_e4m3fn)
    )


def least_error_scale(groups: torch.Tensor, amax: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The float8_e4m3fn scale (groups) with the least squared error of groups (groups, 16) after `unpack`.

    Six scales are tried: the one that maps amax to 6, the one that maps it to 4 (Cook et al., "Four Over
    Six", 2025: this avoids the grid's widest step, 4 to 6), and the E4M3 numbers below and above each. All
    numbers between and two further ones would gain 0.3 % more. The first is kept unless another is better.
    """
    size = groups.float().abs()
    six, four = (block_scale(amax, second, target).view(torch.uint8) for target in (FP4_MAX, 4.0))
    best, least_squares = six, _squared_error(size, six, second)
    for byte in (six - 1, six + 1, four, four - 1, four + 1):
        byte.clamp_(*_SCALE_BYTES)
        error = _squared_error(size, byte, second)
        # never if `least_squares` is NaN: zeros in a matrix whose scales are too small for float32
        better = error < least_squares * _BETTER
        best, least_squares = torch.where(better, byte, best), torch.where(better, error, least_squares)
    return best.view(torch.float8_e4m3fn)


def _squared_error(size: torch.Tensor, byte: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Squared error, float32 (groups), of absolute values (groups, 16) with scales given as E4M3 bytes."""
    divisor = (byte.view(torch.float8_e4m3fn).float() * second)[:, None]
    halves, ones, twos = _step_counts(size / divisor)
    value = ones.add_(halves, alpha=0.5).add_(twos, alpha=2).sub_(6)
    return value.mul_(divisor).sub_(size).square_().sum(-1)


def encode(values: torch.Tensor) -> torch.Tensor:
    """4-bit codes (uint8, one per value) of values on the E2M1 scale. Values beyond +-6 saturate; NaN becomes
    6.
    """
    room = values.abs()
    halves, ones, twos = _step_counts(room)
    code = halves.add_(ones).add_(twos).sub_(4).nan_to_num_(7)
    code.add_(torch.lt(values, 0, out=room), alpha=8)
    # torch has vector instructions for conversion to int8, and none for uint8
    return code.to(torch.int8).view(torch.uint8)


def _step_counts(size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Absolute values on the E2M1 scale, counted in the steps of its three pieces; overwrites `size`.

    The grid goes by 0.5 up to 2, by 1 up to 4 and by 2 up to 6. Counted from zero but held within its
    piece, a value is 0 to 4 halves, 2 to 4 ones and 2 to 3 twos. So code = halves + (ones - 2) + (twos -
    2), and the value that it stands for is halves / 2 + (ones - 2) + 2 (twos - 2). In every piece a code
    is even where the count is: half to even is to the even code.
    """
    halves = (size * 2).round_().clamp_(max=4)
    ones = size.round().clamp_(2, 4)
    twos = size.mul_(0.5).round_().clamp_(2, 3)
    return halves, ones, twos


def _two_to_a_byte(codes: torch.Tensor) -> torch.Tensor:
    """Packs codes (..., in) two to a byte (..., in / 2). Read as one 16-bit number, two codes have the even
    column in the low byte.
    """
    pairs = codes.view(torch.int16)
    return ((pairs >> 4) | pairs).to(torch.uint8)


def unpack(packed: Packed) -> torch.Tensor:
    """The values of `packed`, float32 (..., out, in)."""
    grid = torch.tensor([*GRID, *(-value for value in GRID)])
    # the two values of each of the 256 bytes
    pairs = torch.stack([grid.repeat(16), grid.repeat_interleave(16)], -1).to(packed.weight.device)
    codes = packed.weight.reshape(-1, GROUP // 2)
    scale = (packed.weight_scale.float() * packed.weight_scale_2[..., None, None]).reshape(-1, 1)
    values = _by_chunks(
        lambda chunk, chunk_scale: (
            pairs.index_select(0, chunk.flatten().int()).view(-1, GROUP).mul_(chunk_scale)
        ),
        codes,
        scale,
    )
    return values.view(*packed.weight.shape[:-1], -1)


def _by_chunks(work: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """The result of `work` on tensors with one row per group. A CPU handles `CHUNK` weights at a time, a GPU
    all of them.
    """
    if tensors[0].device.type != "cpu":
        return work(*tensors)
    out: torch.Tensor | None = None
    start = 0
    for chunks in zip(*(tensor.split(CHUNK // GROUP) for tensor in tensors), strict=True):
        result = work(*chunks)
        if out is None:
            out = result.new_empty(len(tensors[0]), *result.shape[1:])
        # copied here: torch.cat at the end took longer than the rest with two threads
        out[start : start + len(result)] = result
        start += len(result)
    return cast(torch.Tensor, out)  # `split` gives one part at least
