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

    def rows_per_process(self, rows: int) -> int:
        """Rows that each process holds of `rows`; the last ones of the last process are nobody's where
        they do not divide.
        """
        return -(-rows // self.count)

    def put(self, local_rows: torch.Tensor, first: int, value: torch.Tensor) -> None:
        """Keeps what falls to this process, `own` (height, width), of `value` (n, width), the rows from
        `first` on.
        """
        start = self.rank * len(local_rows)
        a, b = max(first, start), min(first + len(value), start + len(local_rows))
        if a < b:
            local_rows[a - start : b - start] = value[a - first : b - first]

    def gather(self, local_rows: torch.Tensor, rows: int) -> torch.Tensor:
        """All `rows` of what every process holds a share of: (height, width) -> (rows, width). Waits for
        all processes.
        """
        if self.count == 1:
            return local_rows
        gathered = local_rows.new_empty(self.count * len(local_rows), *local_rows.shape[1:])
        # As bytes: not every backend knows every dtype.
        distributed.all_gather_into_tensor(gathered.view(torch.uint8), local_rows.view(torch.uint8))
        return gathered[:rows]
