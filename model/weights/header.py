"""The header of a safetensors file, checked in full before a tensor is read.

The format is at https://github.com/huggingface/safetensors: the header's length in 8 bytes, the header as
JSON, then the tensors' bytes without gaps. Any difference from that is refused, because readers disagree
about it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.weights.paths import CheckpointError, member, parse_object

HEADER_BYTES = 100_000_000  # the limit of the safetensors library
DIMENSIONS = 16
ELEMENTS = 2**48  # of one tensor
METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Location of one tensor. `start` and `end` are byte offsets in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


def header(file: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Name -> Entry of one safetensors file, and its metadata. Raises CheckpointError on a truncated file,
    another format, and a header that does not describe the file's bytes exactly once.
    """
    member(file.parent, file.name)
    try:
        raw, start, size = _raw(file)
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(str(error), "a whole safetensors file") from error
    try:
        metadata = _metadata(raw)
        entries = {name: _entry(file, name, value, start) for name, value in raw.items()}
    except ValueError as error:
        raise CheckpointError(
            f"{file.name} has a broken header: {error}", "the header that the safetensors library writes"
        ) from error
    _check_coverage(file, entries, start, size)
    return entries, metadata


def _raw(file: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON of the header, the byte at which the tensors begin, and the file's size."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= size - 8:
            raise ValueError(
                f"{file.name} is not a safetensors file, or was cut off in its header ({size} bytes)"
            )
        if length > HEADER_BYTES:
            raise ValueError(f"{file.name} announces a header of {length} bytes, more than {HEADER_BYTES}")
        try:
            return parse_object(opened.read(length)), 8 + length, size
        except ValueError as error:
            raise ValueError(f"{file.name} has a broken header: {error}") from error


def _metadata(raw: dict[str, Any]) -> dict[str, str]:
    """Removes the metadata from the header and returns it."""
    metadata = raw.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{METADATA} is no object of texts")
    return metadata


def _entry(file: Path, name: str, value: Any, start: int) -> Entry:
    """One tensor of the header, whose offsets count from byte `start`. Raises ValueError with its name."""
    shown = name if name.isprintable() else ascii(name)
    if not name:
        raise ValueError("a tensor has no name")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown} has not dtype, shape and data_offsets alone")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{shown} has the dtype {dtype!r:.40}, known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > DIMENSIONS or math.prod(shape) > ELEMENTS:
        raise ValueError(f"{shown} has the shape {shape!r:.80}, which no tensor has")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{shown} has the data_offsets {offsets!r:.80}, which are no begin and end")
    entry = Entry(file, dtype, tuple(shape), start + offsets[0], start + offsets[1])
    if entry.bytes != (needed := math.prod(shape) * DTYPES[dtype].itemsize):
        raise ValueError(f"{shown} takes {needed} bytes as {dtype} {entry.shape}, and has {entry.bytes}")
    return entry


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_coverage(file: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    """Raises CheckpointError unless the tensors cover all bytes after the header, each byte once."""
    previous, end = "the header", start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        shown = name if name.isprintable() else ascii(name)
        if entry.end > size:
            raise CheckpointError(
                f"{file.name} is truncated: {shown} ends at byte {entry.end}, the file at {size}",
                "a whole safetensors file",
            )
        if entry.start != end:
            fault = "share bytes" if entry.start < end else f"have {entry.start - end} bytes between them"
            raise CheckpointError(
                f"{file.name} has a broken header: {previous} and {shown} {fault}",
                "tensors one after the other, as the safetensors library writes them",
            )
        previous, end = shown, entry.end
    if end != size:
        raise CheckpointError(
            f"{file.name} has {size - end} bytes after its last tensor, {previous}",
            "a file that ends with its last tensor",
        )
