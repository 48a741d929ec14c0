"""Compares packed NVFP4 weights with the weights that they were made from.

Stage quantize records in audit.json how it chose the scales. Quantising the source in that way must give the
same bytes again. How others chose theirs is not known; there, every code must stand for a value within
rounding of the source's, at the scale that its group has.

A sample is rows of every linear, the same ones each time. It holds the groups whose scale is the largest
possible: the largest weight of a matrix is in one of them, and decides the matrix's weight_scale_2.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from model import audit
from model.faults import Finding, unreadable
from model.weights import nvfp4
from model.weights.checkpoint import Tensors, results_in_order
from model.weights.nvfp4 import CHUNK, FP4_MAX, FP8_MAX, GROUP, Packed
from model.weights.paths import CheckpointError, member, read_json

RECORD = "audit.json"
ROUNDING = "rounding"  # the rule where none is recorded
RULES = (*nvfp4.SEARCHES, ROUNDING)
PARTS = ("weight", "weight_scale", "weight_scale_2")
THREADS = 16
SHARE, PLACES = 32, 4  # a sample is a 32nd of the rows of a linear, from four places
FOREIGN = 1 / 8  # of the groups: with more wrong ones a linear counts as made of other weights
ROOM = 6.8  # below the least of what `_intervals` gives the code 6 at any scale (6 x 2 / 1.75)
# Relative, at the ends of a rounding interval: an exporter may have rounded divisor and quotient to BF16.
TOLERANCE = 2.0**-7
# The sum of squares depends on the order of its terms: a GPU may find another scale best, by about 2^-16.
EQUAL_ERROR = 1 + 2.0**-14
# From these bytes on a scale may be that of the largest weight: 448, and with `mse` the number below too.
LARGEST = {"nearest": 0x7E, "mse": 0x7D}
FLOATS = ("BF16", "F16", "F32")
Progress = Callable[[int, int], None]  # bytes of codes and scales that were compared, and all of them
_CHANGED = "It has changed since it was written: copy it again, or quantise again."
_OTHER = "It was made of other weights: give --base the folder that it was made from."
_EITHER = (
    "Copy it again. If most linears are named, it was made of other weights or trained after it was quantised"
    " (QAD): give --base the folder that it was made from."
)


@dataclass(frozen=True)
class Rows:
    """Rows of one linear: `weight` (rows, in) as the source has them, and as they are `packed`."""

    module: str
    weight: torch.Tensor
    packed: Packed

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in vars(self.packed).values())


@dataclass(frozen=True)
class Record:
    """What stage quantize recorded of a checkpoint: one of RULES, and the `digest` of its input scales."""

    rule: str = ROUNDING
    input_scales: str | None = None


def record(folder: Path) -> Record:
    """Raises CheckpointError if audit.json is broken or records what no stage writes."""
    if not member(folder, RECORD).exists():
        return Record()
    report = read_json(folder / RECORD)
    rule, calibration = report.get("scales", ROUNDING), report.get("calibration", {})
    digest = calibration.get("input_scales") if isinstance(calibration, dict) else False
    if rule in RULES and isinstance(digest, str | None):
        return Record(rule, digest)
    raise CheckpointError(
        f"scales {rule!r:.40} and input_scales {digest!r:.40} in {RECORD}",
        f"{' or '.join(nvfp4.SEARCHES)}, and a SHA-256",
        f"Put back the {RECORD} that stage quantize wrote, or remove it.",
    )


def input_scales(checkpoint: Tensors, modules: list[str], recorded: str) -> Iterator[Finding]:
    """A finding if the input scales of the linears `modules` have another digest than was recorded."""
    names = [name for module in modules if (name := f"{module}.input_scale") in checkpoint.entries]
    if audit.digest({name: checkpoint.tensor(name) for name in names}) != recorded:
        yield Finding(
            "input_scale",
            f"another value than the calibration's in at least one of {len(names):,} linears",
            f"the input scales whose SHA-256 {RECORD} has",
            _CHANGED,
        )


def compare(
    checkpoint: Tensors,
    source: Tensors,
    modules: list[str],
    rule: str,
    deep: bool,
    on_progress: Progress | None = None,
) -> tuple[list[Finding], dict[str, Any]]:
    """Findings about the packed linears `modules`, which have the shapes that they should have; and the fact
    `compared` of docs/formats.md.

    `rule` is one of RULES. `deep` compares all rows and tells `on_progress` after every linear; else a sample
    is compared. Each of up to THREADS threads has one linear in memory.
    """
    faults = {module: _source_fault(checkpoint, source, module) for module in modules}
    findings = [finding for finding in faults.values() if finding]
    there = sorted((module for module in modules if not faults[module]), key=partial(_place, source))
    total = sum(checkpoint.entries[f"{module}.{part}"].bytes for module in there for part in PARTS)
    work = ((module, partial(_compared, checkpoint, source, module, rule, deep)) for module in there)
    done = 0
    for _, (found, count) in results_in_order(work, THREADS):
        findings += found
        done += count
        if deep and on_progress:
            on_progress(done, total)
    return findings, {"rule": rule, "bytes": done, "of": total}


def _source_fault(checkpoint: Tensors, source: Tensors, module: str) -> Finding | None:
    name = f"{module}.weight"
    out, half = checkpoint.entries[name].shape
    entry = source.entries.get(name)
    if entry and entry.dtype in FLOATS and entry.shape == (out, 2 * half):
        return None
    return Finding(
        name,
        f"{entry.dtype} {entry.shape} in the source" if entry else "no such tensor in the source",
        f"{' or '.join(FLOATS)} {(out, 2 * half)}",
        "The source is another model, or quantised itself: give --base the folder that this was made from.",
    )


def _place(source: Tensors, module: str) -> tuple[str, int]:
    """Where the source has a linear: disks are fastest in the order of their files."""
    entry = source.entries[f"{module}.weight"]
    return str(entry.file), entry.start


def _compared(
    checkpoint: Tensors, source: Tensors, module: str, rule: str, deep: bool
) -> tuple[list[Finding], int]:
    """Findings about one linear, and how many bytes of it were compared."""
    try:
        rows = _read(checkpoint, source, module, _chosen(checkpoint, module, rule, deep))
        return list(_beyond_rounding(rows) if rule == ROUNDING else _requantised(rows, rule)), rows.bytes
    except (CheckpointError, OSError) as error:
        return [unreadable(module, error)], 0


def _chosen(checkpoint: Tensors, module: str, rule: str, deep: bool) -> torch.Tensor:
    """Which rows of a linear are compared, bool (out)."""
    count = checkpoint.entries[f"{module}.weight"].shape[0]
    everything = torch.ones(count, dtype=torch.bool)
    if deep:
        return everything
    chosen = sample(module, count)
    if rule == ROUNDING:
        return chosen
    scale = checkpoint.tensor(f"{module}.weight_scale").view(torch.uint8)
    largest = (scale >= LARGEST[rule]).any(-1)
    # without such a scale only all rows can tell whether it is gone, or the numbers are too small for it
    return chosen | largest if largest.any() else everything


def sample(module: str, count: int) -> torch.Tensor:
    """About a 32nd of `count` rows, bool (count): some rows of each quarter. The name decides which."""
    seeded = random.Random(module)
    places, rows = min(PLACES, count), max(1, count // (SHARE * PLACES))
    chosen = torch.zeros(count, dtype=torch.bool)
    for place in range(places):
        first, end = count * place // places, count * (place + 1) // places
        start = seeded.randint(first, end - rows)
        chosen[start : start + rows] = True
    return chosen


def _read(checkpoint: Tensors, source: Tensors, module: str, chosen: torch.Tensor) -> Rows:
    edge = torch.zeros(1, dtype=torch.int)
    edges = torch.diff(chosen.int(), prepend=edge, append=edge).nonzero().flatten().tolist()
    spans = [(first, end - first) for first, end in zip(edges[::2], edges[1::2], strict=True)]

    def rows(tensors: Tensors, part: str) -> torch.Tensor:
        read = [tensors.rows(f"{module}.{part}", *span) for span in spans]
        return read[0] if len(read) == 1 else torch.cat(read)

    second = checkpoint.tensor(f"{module}.weight_scale_2")
    packed = Packed(rows(checkpoint, "weight"), rows(checkpoint, "weight_scale"), second)
    return Rows(module, rows(source, "weight"), packed)


def _requantised(rows: Rows, search: str) -> Iterator[Finding]:
    """Findings where quantising the source again gives other bytes."""
    packed, expected = rows.packed, nvfp4.pack(rows.weight, search)
    scales = packed.weight_scale.view(torch.uint8) != expected.weight_scale.view(torch.uint8)
    codes = (packed.weight != expected.weight).view(*scales.shape, -1).any(-1) & ~scales
    if search == "mse" and scales.any():
        # a GPU's choice can be as good and another
        same = Packed(packed.weight, packed.weight_scale, expected.weight_scale_2)
        scales &= ~(_squares(same, rows.weight) <= _squares(expected, rows.weight) * EQUAL_ERROR)
    wrong, total = int((scales | codes).sum()), scales.numel()
    if wrong > FOREIGN * total:
        yield Finding(
            f"{rows.module}.weight",
            f"other weights than in the source, in {wrong:,} of {total:,} groups",
            "the source's weights, quantised",
            _OTHER,
        )
        return
    second, expected_second = packed.weight_scale_2.item(), expected.weight_scale_2.item()
    if second != expected_second:
        yield Finding(
            f"{rows.module}.weight_scale_2",
            f"{second:.9g}",
            f"{expected_second:.9g}, the source's largest weight / {FP4_MAX * FP8_MAX:.0f}",
            _CHANGED,
        )
    for part, what, groups, right in (
        ("weight_scale", "scales", scales, f"those of `scales: {search}`, which {RECORD} records"),
        ("weight", "codes", codes, "the source's weights, rounded to nearest"),
    ):
        if count := int(groups.sum()):
            found = f"other {what} than the source gives, in {count:,} of {total:,} groups"
            yield Finding(f"{rows.module}.{part}", found, right, _CHANGED)


def _squares(packed: Packed, weight: torch.Tensor) -> torch.Tensor:
    """Squared error of every group, float32 (rows, groups)."""
    error = nvfp4.unpack(packed).sub_(weight.float()).square_()
    return error.view(*packed.weight_scale.shape, GROUP).sum(-1)


def _beyond_rounding(rows: Rows) -> Iterator[Finding]:
    """A finding if codes stand for values beyond rounding of the source's, at the scales that are there."""
    packed, wrong, total = rows.packed, 0, rows.packed.weight_scale.numel()
    parts = (
        rows.weight.reshape(-1, GROUP),
        packed.weight.reshape(-1, GROUP // 2),
        packed.weight_scale.reshape(-1),
    )
    for weight, codes, scale in zip(*(part.split(CHUNK // GROUP) for part in parts), strict=True):
        value = weight.float() / (scale.float() * packed.weight_scale_2)[:, None]
        code = torch.stack([codes & 15, codes >> 4], -1).view(-1, GROUP)
        # Most groups have the codes that we would give, and need no closer look. NaN is never <= anything.
        fits = (nvfp4.encode(value) == code).all(-1) & (value.abs().amax(-1) <= ROOM)
        wrong += int(_outside(value[~fits], code[~fits], scale.view(torch.uint8)[~fits]).sum())
    if wrong:
        yield Finding(
            f"{rows.module}.weight",
            f"weights beyond rounding of the source's, in {wrong:,} of {total:,} groups",
            "codes and scales that stand for the source's weights",
            _EITHER,
        )


def _outside(value: torch.Tensor, code: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Which groups have a value outside of the interval that its code stands for, bool (groups). `value`
    (groups, 16) is divided by its scales; `code` uint8 alike; `scale`: the bytes of the groups' scales.
    """
    lowest, highest, room = _intervals()
    size, magnitude = torch.where(code >= 8, -value, value), (code & 7).int()
    size = torch.where(magnitude == 0, value.abs(), size)
    high = highest[magnitude].minimum(room[scale.int()][:, None])
    inside = (size >= lowest[magnitude] * (1 - TOLERANCE)) & (size <= high * (1 + TOLERANCE))
    return ~inside.all(-1)


@cache
def _intervals() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smallest and largest value, on the E2M1 scale, that the codes 0 to 7 stand for; and what 6 stands for
    at most, by the byte of the group's scale.

    The scale was rounded to E4M3, and a search may have taken the number below. So the group's largest weight
    can be 6 times what the second number above the scale would hold.
    """
    grid = torch.tensor(nvfp4.GRID)
    middle = (grid[1:] + grid[:-1]) / 2
    scale = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    above = scale.roll(-2)
    above[0x7D:0x7F] = torch.tensor([480.0, 512.0])  # E4M3 itself ends at 448
    return (
        torch.cat([torch.zeros(1), middle]),
        torch.cat([middle, torch.full((1,), torch.inf)]),
        FP4_MAX * above / scale,
    )
