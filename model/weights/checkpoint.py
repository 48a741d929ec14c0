"""Reads and writes safetensors checkpoints one tensor at a time, so that memory does not depend on the
model's size.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

PIECE = 2**20  # bytes
THREADS = 4  # that read and compute while the main thread writes
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_OF_THE_FOLDER = ("manifest.json", "merge.json")
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


Work = Callable[[], torch.Tensor]  # makes a tensor, or a piece of one


class CheckpointError(ValueError):
    """A file that is not valid for a checkpoint; the message names it."""


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
    """Name -> Entry of one safetensors file, and its metadata. Raises CheckpointError on a truncated file or
    another format.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= size - 8:
            raise CheckpointError(
                f"{file.name} is not a safetensors file, or was cut off in its header ({size} bytes)"
            )
        try:
            raw = json.loads(opened.read(length))
            metadata = raw.pop("__metadata__", {})
            entries = {
                name: Entry(
                    file,
                    value["dtype"],
                    tuple(value["shape"]),
                    *(8 + length + offset for offset in value["data_offsets"]),
                )
                for name, value in raw.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{file.name} has a broken header: {type(error).__name__}: {error}"
            ) from error
    for name, entry in entries.items():
        if entry.end > size:
            raise CheckpointError(
                f"{file.name} is truncated: {name} ends at byte {entry.end}, the file at {size}"
            )
        if entry.dtype in DTYPES and entry.bytes != (
            needed := math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        ):
            raise CheckpointError(
                f"{file.name} has a broken header: {name} takes {needed} bytes as {entry.dtype}"
                f" {entry.shape}, and has {entry.bytes}"
            )
    return entries, metadata


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError, with the file's name, on anything else."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.name} holds a {type(value).__name__}, not an object")
    return value


def weight_map(folder: Path) -> dict[str, str]:
    """The index of a folder: tensor -> file. Raises CheckpointError if it is not a valid index."""
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{INDEX} has no weight_map of tensor names to file names")
    return files


class Tensors:
    """Named tensors of safetensors files, read one at a time."""

    def __init__(self, entries: dict[str, Entry]):
        self.entries = entries

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())

    def raw(self, name: str) -> memoryview:
        """The bytes of one tensor as stored on disk."""
        return tensor_bytes(self.tensor(name))

    def same_bits(self, name: str, other: Tensors) -> bool:
        """Whether `other` holds the tensor with the same bits. Shape and dtype must be the same in both."""
        return all(
            torch.equal(*(piece().reshape(-1).view(torch.uint8) for piece in pieces))
            for pieces in zip(self.pieces(name), other.pieces(name), strict=True)
        )

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in its own dtype and shape."""
        entry = self.entries[name]
        return self._read(name, entry.start, torch.empty(entry.shape, dtype=DTYPES[entry.dtype]))

    def rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Rows `first` to `first + count` (of the first dimension) of one tensor, on the CPU."""
        entry = self.entries[name]
        return self._read(
            name,
            entry.start + entry.bytes // entry.shape[0] * first,
            torch.empty((count, *entry.shape[1:]), dtype=DTYPES[entry.dtype]),
        )

    def spans(self, name: str) -> list[tuple[int, int]]:
        """First row and number of rows of pieces of about a megabyte, which stay in the CPU's cache between
        reading and writing; none for a scalar.
        """
        shape = self.entries[name].shape
        if not shape:
            return []
        step = max(1, PIECE * shape[0] // max(1, self.entries[name].bytes))
        return [(first, min(step, shape[0] - first)) for first in range(0, shape[0], step)]

    def pieces(self, name: str) -> Iterator[Work]:
        """Functions that read one tensor piece by piece, for `write`."""
        if not self.entries[name].shape:
            return iter([partial(self.tensor, name)])
        return (partial(self.rows, name, *span) for span in self.spans(name))

    def _read(self, name: str, start: int, target: torch.Tensor) -> torch.Tensor:
        file = self.entries[name].file
        with file.open("rb", buffering=0) as opened:
            opened.seek(start)
            remaining = tensor_bytes(target)
            while remaining and (count := opened.readinto(remaining)):
                remaining = remaining[count:]
        if remaining:
            raise CheckpointError(f"{file.name} ended in the middle of {name}")
        return target


class Checkpoint(Tensors):
    """A folder of safetensors files. Files and tensors keep their order on disk."""

    def __init__(self, folder: str | Path):
        super().__init__({})
        self.folder = Path(folder)
        index = self.folder / INDEX
        if index.exists():
            self.files = list(dict.fromkeys(weight_map(self.folder).values()))
        elif (self.folder / SINGLE).exists():
            self.files = [SINGLE]
        else:
            raise CheckpointError(f"{self.folder} holds neither {INDEX} nor {SINGLE}")
        self.metadata: dict[str, dict[str, Any]] = {}
        for name in self.files:
            if not (self.folder / name).exists():
                raise CheckpointError(f"{name} is in {INDEX} but not in the folder")
            entries, self.metadata[name] = header(self.folder / name)
            self.entries |= entries

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it was at the first access. Callers must not change it."""
        return read_json(self.folder / "config.json")

    def names_in_file(self, file: str) -> Iterator[str]:
        """Names of the tensors of one file, in byte order."""
        path = self.folder / file
        return iter(
            sorted(
                (n for n, e in self.entries.items() if e.file == path), key=lambda n: self.entries[n].start
            )
        )


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is contiguous on the CPU."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Slot:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPES[self.dtype].itemsize


def write(
    file: Path,
    slots: list[Slot],
    produce: Callable[[Slot], torch.Tensor | Iterable[Work]],
    metadata: dict[str, Any] | None = None,
) -> None:
    """Writes one safetensors file. `produce` gives one tensor at a time: the tensor itself, or work that
    makes it in pieces along its first dimension.

    A few threads do the work ahead of the writing, so that reading, computing and writing overlap. Raises
    CheckpointError if the result has another shape or dtype than its slot.
    """
    offset, table = 0, {}
    for slot in slots:
        table[slot.name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [offset, offset + slot.bytes],
        }
        offset += slot.bytes
    head = json.dumps({"__metadata__": metadata or {"format": "pt"}, **table}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # tensor data begins on a multiple of 8 bytes

    def work() -> Iterator[tuple[Slot, Work]]:
        for slot in slots:
            produced = produce(slot)
            for piece in (
                [partial(torch.Tensor.detach, produced)] if isinstance(produced, torch.Tensor) else produced
            ):
                yield slot, piece

    written = dict.fromkeys(table, 0)
    with file.open("wb", buffering=0) as opened:
        opened.write(struct.pack("<Q", len(head)) + head)
        for slot, piece in results_in_order(work()):
            if (NAMES[piece.dtype], tuple(piece.shape[1:]), piece.ndim) != (
                slot.dtype,
                slot.shape[1:],
                len(slot.shape),
            ):
                raise CheckpointError(
                    f"{slot.name} came out as {piece.dtype} {tuple(piece.shape)}, announced were {slot.dtype}"
                    f" {slot.shape}"
                )
            remaining = tensor_bytes(piece)
            written[slot.name] += remaining.nbytes
            while remaining:
                remaining = remaining[opened.write(remaining) :]
    for slot in slots:
        if written[slot.name] != slot.bytes:
            raise CheckpointError(
                f"{slot.name} came out with {written[slot.name]} bytes, announced were {slot.dtype}"
                f" {slot.shape}"
            )


def results_in_order(work: Iterable[tuple[Slot, Work]]) -> Iterator[tuple[Slot, torch.Tensor]]:
    """The results of work in its order, computed by a few threads. At most twice as many results as threads
    exist or are being computed at once.
    """
    threads, previous_threads = min(THREADS, os.cpu_count() or 1), torch.get_num_threads()
    # each thread works on its own piece; nested thread pools would wait for each other
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            pending: deque[tuple[Slot, Future[torch.Tensor]]] = deque()
            for slot, piece in work:
                pending.append((slot, pool.submit(piece)))
                if len(pending) > 2 * threads:
                    first, result = pending.popleft()
                    yield first, result.result()
            while pending:
                first, result = pending.popleft()
                yield first, result.result()
    finally:
        torch.set_num_threads(previous_threads)


def shards(slots: list[Slot], limit: int) -> list[tuple[str, list[Slot]]]:
    """File names and their tensors, in order, each file at most `limit` bytes (or one tensor)."""
    groups: list[list[Slot]] = [[]]
    for slot in slots:
        if groups[-1] and sum(s.bytes for s in groups[-1]) + slot.bytes > limit:
            groups.append([])
        groups[-1].append(slot)
    return [(f"model-{n:05d}-of-{len(groups):05d}.safetensors", group) for n, group in enumerate(groups, 1)]


def files_beside(folder: Path) -> list[Path]:
    """Files next to the weights that belong to them, sorted: settings, tokenizer, the index. Not those about
    this folder alone: a manifest or a merge's report.
    """
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix != ".safetensors" and path.name not in _OF_THE_FOLDER
    ]


def write_index(folder: Path, layout: list[tuple[str, list[Slot]]]) -> None:
    """Writes the index of the shards: total size in bytes, and the file of every tensor."""
    total = sum(slot.bytes for _, group in layout for slot in group)
    table = {slot.name: name for name, group in layout for slot in group}
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": table}, indent=2) + "\n"
    )
