"""Safetensors checkpoints read and written one tensor at a time, so that memory never depends on the model's size."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A file that is not what a checkpoint needs; the message names it."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies. `start` and `end` are byte offsets in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


def header(file: Path) -> tuple[dict[str, Entry], dict]:
    """Name -> Entry of one safetensors file, and its metadata. Raises CheckpointError on a truncated or foreign file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"{file.name} is not a safetensors file, or was cut off in its header ({size} bytes)")
        try:
            raw = json.loads(opened.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file.name} has a broken header: {error}") from error
    metadata = raw.pop("__metadata__", {})
    entries = {}
    for name, value in raw.items():
        first, last = value["data_offsets"]
        entries[name] = Entry(file, value["dtype"], tuple(value["shape"]), 8 + length + first, 8 + length + last)
        if entries[name].end > size:
            raise CheckpointError(f"{file.name} is truncated: {name} ends at byte {entries[name].end}, the file at {size}")
    return entries, metadata


class Tensors:
    """Named tensors of safetensors files, read one at a time."""

    def __init__(self, entries: dict[str, Entry]):
        self.entries = entries

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())

    def raw(self, name: str) -> bytearray:
        """The bytes of one tensor as they lie on disk."""
        entry = self.entries[name]
        with entry.file.open("rb") as opened:
            opened.seek(entry.start)
            data = bytearray(entry.bytes)
            if opened.readinto(data) != entry.bytes:
                raise CheckpointError(f"{entry.file.name} ended in the middle of {name}")
        return data

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in its own dtype and shape."""
        entry = self.entries[name]
        if not entry.bytes:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        return torch.frombuffer(self.raw(name), dtype=DTYPES[entry.dtype]).reshape(entry.shape)


class Checkpoint(Tensors):
    """A folder of safetensors. Files and tensors keep the order in which they stand on disk."""

    def __init__(self, folder: str | Path):
        super().__init__({})
        self.folder = Path(folder)
        index = self.folder / INDEX
        if index.exists():
            self.files = list(dict.fromkeys(json.loads(index.read_text())["weight_map"].values()))
        elif (self.folder / SINGLE).exists():
            self.files = [SINGLE]
        else:
            raise CheckpointError(f"{self.folder} holds neither {INDEX} nor {SINGLE}")
        self.metadata: dict[str, dict] = {}
        for name in self.files:
            if not (self.folder / name).exists():
                raise CheckpointError(f"{name} is in {INDEX} but not in the folder")
            entries, self.metadata[name] = header(self.folder / name)
            self.entries |= entries

    @property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    def in_file(self, file: str) -> Iterator[str]:
        """Names of the tensors of one file, in the order of their bytes."""
        path = self.folder / file
        return iter(sorted((n for n, e in self.entries.items() if e.file == path), key=lambda n: self.entries[n].start))


def encode(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


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


def write(file: Path, slots: list[Slot], produce: Callable[[Slot], bytes | bytearray | torch.Tensor], metadata: dict | None = None) -> None:
    """Writes one safetensors file, asking for one tensor at a time.

    Raises CheckpointError if what `produce` returns has another shape, dtype or size than the slot announces.
    """
    at, table = 0, {}
    for slot in slots:
        table[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [at, at + slot.bytes]}
        at += slot.bytes
    head = json.dumps({"__metadata__": metadata or {"format": "pt"}, **table}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # tensor data begins on a multiple of 8 bytes
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(head)) + head)
        for slot in slots:
            made = produce(slot)
            if isinstance(made, torch.Tensor):
                if (NAMES[made.dtype], tuple(made.shape)) != (slot.dtype, slot.shape):
                    raise CheckpointError(f"{slot.name} came out as {made.dtype} {tuple(made.shape)}, announced were {slot.dtype} {slot.shape}")
                made = encode(made)
            if len(made) != slot.bytes:
                raise CheckpointError(f"{slot.name} came out with {len(made)} bytes, announced were {slot.bytes}")
            opened.write(made)


def shards(slots: list[Slot], limit: int) -> list[tuple[str, list[Slot]]]:
    """File names and their tensors, in order, each file at most `limit` bytes (or one tensor)."""
    groups: list[list[Slot]] = [[]]
    for slot in slots:
        if groups[-1] and sum(s.bytes for s in groups[-1]) + slot.bytes > limit:
            groups.append([])
        groups[-1].append(slot)
    return [(f"model-{n:05d}-of-{len(groups):05d}.safetensors", group) for n, group in enumerate(groups, 1)]


def write_index(folder: Path, layout: list[tuple[str, list[Slot]]]) -> None:
    """The index beside the shards: total size in bytes, and the file of every tensor."""
    total = sum(slot.bytes for _, group in layout for slot in group)
    table = {slot.name: name for name, group in layout for slot in group}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": table}, indent=2) + "\n")
