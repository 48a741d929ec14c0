"""Frozen weights that several processes hold between them, each an equal run of rows, brought together to
be multiplied with.

What travels is the packed form, a quarter of what the dense weights would be; nothing is sent back, since
a frozen weight has no gradient. Every process has to come to each product in the same order, as often as
the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as distributed


@dataclass(frozen=True)
class Shards:
    """The share of process `rank` of `count`; one process has all rows."""

    rank: int = 0
    count: int = 1

    def height(self, rows: int) -> int:
        """Rows that each process holds of `rows`; the last ones of the last process are nobody's where
        they do not divide.
        """
        return -(-rows // self.count)

    def put(self, own: torch.Tensor, first: int, value: torch.Tensor) -> None:
        """Keeps what falls to this process, `own` (height, width), of `value` (n, width), the rows from
        `first` on.
        """
        start = self.rank * len(own)
        a, b = max(first, start), min(first + len(value), start + len(own))
        if a < b:
            own[a - start : b - start] = value[a - first : b - first]

    def whole(self, own: torch.Tensor, rows: int) -> torch.Tensor:
        """All `rows` of what every process holds a share of: (height, width) -> (rows, width). Waits for
        all processes.
        """
        if self.count == 1:
            return own
        gathered = own.new_empty(self.count * len(own), *own.shape[1:])
        # As bytes: not every backend knows every dtype.
        distributed.all_gather_into_tensor(gathered.view(torch.uint8), own.view(torch.uint8))
        return gathered[:rows]
