"""Reads and writes safetensors checkpoints one tensor at a time, so that memory does not depend on the
model's size.
"""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from model.weights import origin
from model.weights.header import DTYPES, NAMES, Entry, header
from model.weights.paths import TRUST, CheckpointError, member, read_json, shard

PIECE = 2**20  # bytes
THREADS = 4  # that read and compute while the main thread writes
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OF_THE_FOLDER = ("manifest.json", "merge.json", TRUST, origin.FILE)
Work = Callable[[], torch.Tensor]  # makes a tensor, or a piece of one
Subject = TypeVar("Subject")  # what a piece of work is about
Result = TypeVar("Result")


def weight_map(folder: Path, index: str = INDEX) -> dict[str, str]:
    """The index of a folder: tensor -> name of a file of this folder. Raises CheckpointError if it is not a
    valid index.
    """
    files = read_json(folder / index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(
            f"{index} has no weight_map of tensor names to file names",
            "the index that belongs to the safetensors files",
        )
    for file in set(files.values()):
        shard(folder, file)
    return files


def indexed(folder: Path, index: str = INDEX) -> tuple[dict[str, Entry], dict[str, dict[str, Any]]]:
    """Name -> Entry of all shards that an index names, and the metadata of each shard by file name, both in
    the order of the index. Raises CheckpointError unless every tensor is in the shard that the index says.
    """
    table = weight_map(folder, index)
    entries: dict[str, Entry] = {}
    metadata: dict[str, dict[str, Any]] = {}
    for file in dict.fromkeys(table.values()):
        if not (folder / file).exists():
            raise CheckpointError(f"{file} is in {index} but not in the folder", "every shard of the index")
        found, metadata[file] = header(folder / file)
        if astray := [name for name in found if table.get(name) != file]:
            raise CheckpointError(
                f"{astray[0]} is in {file}, and {index} says {table.get(astray[0], 'nothing of it')}",
                "every tensor once, in the shard that the index says",
                "Download the index and the shards again, all of one commit.",
            )
        entries |= found
    if missing := [name for name in table if name not in entries]:
        raise CheckpointError(
            f"{missing[0]} is not in {table[missing[0]]}, where {index} says it is",
            "every tensor in the shard that the index says",
            "Download the index and the shards again, all of one commit.",
        )
    return entries, metadata


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
        remaining = tensor_bytes(target)
        try:
            with file.open("rb", buffering=0) as opened:
                opened.seek(start)
                while remaining and (count := opened.readinto(remaining)):
                    remaining = remaining[count:]
        except OSError as error:  # it does not say which file, and two folders may be read at once
            raise CheckpointError(
                f"{file.parent.name}/{file.name} cannot be read: {error.strerror or error}"
            ) from error
        if remaining:
            raise CheckpointError(f"{file.name} ended in the middle of {name}")
        return target


class Checkpoint(Tensors):
    """A folder of safetensors files. Files and tensors keep their order on disk."""

    def __init__(self, folder: str | Path):
        super().__init__({})
        self.folder = Path(folder)
        self.metadata: dict[str, dict[str, Any]] = {}
        if member(self.folder, INDEX).exists():
            self.entries, self.metadata = indexed(self.folder)
        elif member(self.folder, SINGLE).exists():
            self.entries, self.metadata[SINGLE] = header(self.folder / SINGLE)
        else:
            raise CheckpointError(
                f"{self.folder} holds neither {INDEX} nor {SINGLE}{_pickles(self.folder)}",
                "weights in safetensors files",
                "Take the repository's safetensors files, or have its author convert them.",
            )
        self.files = list(self.metadata)

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


def _pickles(folder: Path) -> str:
    """Words about the pickled weights of a folder, if it has any."""
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    return f"; it has {pickles[0]}, a pickle, which can run code and is never loaded" if pickles else ""


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


def results_in_order(
    work: Iterable[tuple[Subject, Callable[[], Result]]], limit: int = THREADS
) -> Iterator[tuple[Subject, Result]]:
    """The results of work in its order, computed by at most `limit` threads. At most twice as many results as
    threads exist or are being computed at once.
    """
    threads, previous_threads = min(limit, os.cpu_count() or 1), torch.get_num_threads()
    # each thread works on its own piece; nested thread pools would wait for each other
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            pending: deque[tuple[Subject, Future[Result]]] = deque()
            for subject, piece in work:
                pending.append((subject, pool.submit(piece)))
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
    this folder alone: a manifest or a merge's report. Raises CheckpointError for anything else than regular
    files and folders (paths.py has the rule for links).
    """
    return [
        member(folder, path.name)
        for path in sorted(folder.iterdir())
        if (path.is_symlink() or not path.is_dir())
        and path.suffix != ".safetensors"
        and path.name not in _OF_THE_FOLDER
    ]


def write_index(folder: Path, layout: list[tuple[str, list[Slot]]]) -> None:
    """Writes the index of the shards: total size in bytes, and the file of every tensor."""
    total = sum(slot.bytes for _, group in layout for slot in group)
    table = {slot.name: name for name, group in layout for slot in group}
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": table}, indent=2) + "\n"
    )
