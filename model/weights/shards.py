"""Frozen weights shared by several processes. Each holds an equal run of rows, and they are gathered for each
product.

Processes exchange the packed form, a quarter of the dense weights' size. Nothing is sent back, because a
frozen weight has no gradient. Every process must run the same products in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as distributed


@dataclass(frozen=True)
class Shards:
    """The share of process `rank` of `count`. A single process has all rows."""

    rank: int = 0
    count: int = 1

    def rows_per_process(self, rows: int) -> int:
        """Rows per process: ceil(rows / count). If `rows` is not divisible, the last process's trailing rows
        are padding.
        """
        return -(-rows // self.count)

    def put(self, local_rows: torch.Tensor, first: int, value: torch.Tensor) -> None:
        """Stores this process's part of `value` (n, width), the rows from `first` on, in `local_rows`
        (rows_per_process, width).
        """
        start = self.rank * len(local_rows)
        a, b = max(first, start), min(first + len(value), start + len(local_rows))
        if a < b:
            local_rows[a - start : b - start] = value[a - first : b - first]

    def gather(self, local_rows: torch.Tensor, rows: int) -> torch.Tensor:
        """All `rows` of a tensor that is shared by all processes: (rows_per_process, width) -> (rows, width).
        Waits for all processes.
        """
        if self.count == 1:
            return local_rows
        gathered = local_rows.new_empty(self.count * len(local_rows), *local_rows.shape[1:])
        # As bytes: not every backend knows every dtype.
        distributed.all_gather_into_tensor(gathered.view(torch.uint8), local_rows.view(torch.uint8))
        return gathered[:rows]
