"""A checkpoint of random weights at any size. They are generated when they are read, so measurements need no
disk.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from model.families.nemotron_h import names
from model.weights.checkpoint import Checkpoint, Slot, Work, shards
from model.weights.header import DTYPES, Entry

BLOCK = 2**26  # random numbers, of which every tensor is a cut


class Random(Checkpoint):
    """Reads like a Checkpoint of `config`, which is written to `folder`/config.json. It has the same numbers
    every time.
    """

    def __init__(self, config: dict[str, Any], folder: Path, limit: int = 5 * 10**9):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        self.folder, self.entries, self.files = folder, {}, []
        for file, group in shards(
            [Slot(name, spec.dtype, spec.shape) for name, spec in names.tensors(config).items()], limit
        ):
            offset = 0
            for slot in group:
                self.entries[slot.name] = Entry(
                    folder / file, slot.dtype, slot.shape, offset, offset + slot.bytes
                )
                offset += slot.bytes
            self.files.append(file)
        self.metadata = {file: {"format": "pt"} for file in self.files}
        self._block = torch.empty(BLOCK, dtype=torch.bfloat16).normal_(
            std=0.02, generator=torch.Generator().manual_seed(0)
        )

    def tensor(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        if name.endswith(("A_log", "norm.weight", "norm_f.weight", ".D")):
            return torch.ones(entry.shape, dtype=DTYPES[entry.dtype])
        count, start = torch.Size(entry.shape).numel(), zlib.crc32(name.encode()) % (BLOCK // 2)
        block = self._block if start + count <= BLOCK else self._block.repeat((start + count) // BLOCK + 1)
        return block[start : start + count].clone().view(entry.shape).to(DTYPES[entry.dtype])

    def rows(self, name: str, first: int, count: int) -> torch.Tensor:
        return self.tensor(name)[first : first + count]

    def pieces(self, name: str) -> Iterator[Work]:
        return iter([lambda: self.tensor(name)])
