"""Which conversations a step trains on, and how they are packed into sequences.

The rows of a step depend only on the seed, the step's number and the lengths of all rows. So a resumed run,
also one with another number of ranks, trains on exactly the rows of an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model.families.family import Operations
from model.labels import IGNORED
from model.layers.documents import Documents
from stages.train.balance import spread


@dataclass(frozen=True)
class Pack:
    """One packed sequence: `ids` and `labels`, int64 (tokens,); the positions of its documents; and their row
    numbers in the data set.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    documents: Documents
    rows: tuple[int, ...] = ()


# A rank without a conversation runs this pack: it passes through every layer and has no loss.
IDLE = Pack(torch.zeros(1, dtype=torch.int64), torch.tensor([IGNORED]), Documents((1,)))


class Order:
    """An endless sequence of row numbers, shuffled anew in every epoch and cut into steps. `lengths` are the
    tokens of each row.

    A step has `batch` rows. If `batch_tokens` is above 0, `batch` is not used: a step takes rows as long as
    they have at most `batch_tokens` tokens together, and at least one row.
    """

    def __init__(self, lengths: Sequence[int], seed: int, batch: int, batch_tokens: int = 0):
        self.lengths, self.seed, self.batch, self.batch_tokens = lengths, seed, batch, batch_tokens
        self._epoch = -1
        self._rows: list[int] = []
        self._starts = [0]  # for batch_tokens: the place where each step begins, as far as computed

    def __getitem__(self, place: int) -> int:
        """The row at `place` of the sequence."""
        epoch, position = divmod(place, len(self.lengths))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._rows = epoch, torch.randperm(len(self.lengths), generator=generator).tolist()
        return self._rows[position]

    def step(self, number: int) -> list[int]:
        """The rows of step `number` (from 0)."""
        if not self.batch_tokens:
            return [self[place] for place in range(number * self.batch, (number + 1) * self.batch)]
        while len(self._starts) <= number + 1:
            self._starts.append(self._end(self._starts[-1]))
        return [self[place] for place in range(self._starts[number], self._starts[number + 1])]

    def steps(self, epochs: float) -> int:
        """The fewest steps that train each row `epochs` times on average; at least one."""
        rows = max(1, round(epochs * len(self.lengths)))
        if not self.batch_tokens:
            return -(-rows // self.batch)
        number = 0
        while (rows := rows - len(self.step(number))) > 0:
            number += 1
        return number + 1

    def _end(self, start: int) -> int:
        """The place after the last row of the step that begins at `start`."""
        end, tokens = start + 1, self.lengths[self[start]]
        while (tokens := tokens + self.lengths[self[end]]) <= self.batch_tokens:
            end += 1
        return end


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Groups of indices whose lengths sum to at most `capacity`. Lengths are placed from longest to shortest,
    each where the least space would be left.

    Raises ValueError if a single length exceeds `capacity`.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > capacity:
            raise ValueError(f"row {index} has {lengths[index]} tokens, a packed sequence {capacity}")
        fitting = [g for g, space in enumerate(room) if space >= lengths[index]]
        if fitting:
            tightest = min(fitting, key=lambda g: room[g])
            groups[tightest].append(index)
            room[tightest] -= lengths[index]
        else:
            groups.append([index])
            room.append(capacity - lengths[index])
    return groups


def packs(rows: list[dict[str, Any]], capacity: int) -> list[Pack]:
    """The rows (`input_ids`, `labels`, `number`) end to end, in as few sequences of at most `capacity` tokens
    as best fit needs.
    """
    sequences = []
    for group in best_fit([len(row["input_ids"]) for row in rows], capacity):
        ids = [i for g in group for i in rows[g]["input_ids"]]
        # The document packed before must not predict this one's first token.
        labels = [i for g in group for i in (IGNORED, *rows[g]["labels"][1:])]
        sequences.append(
            Pack(
                torch.tensor(ids),
                torch.tensor(labels),
                Documents(tuple(len(rows[g]["input_ids"]) for g in group)),
                tuple(rows[g]["number"] for g in group),
            )
        )
    return sequences


def row_shares(rows: list[dict[str, Any]], count: int, work: Operations) -> list[list[dict[str, Any]]]:
    """The rows in `count` shares of about equal `work`."""
    costs = [work.of(len(row["input_ids"]), trained_tokens([row])) for row in rows]
    return [[rows[index] for index in indices] for indices in spread(costs, count)]


def rank_packs(
    rows: list[dict[str, Any]], rank: int, count: int, capacity: int, equal_count: bool, work: Operations
) -> list[Pack]:
    """The packed share of rank `rank` of `count`. Every rank gets about equal `work`.

    `equal_count`: pad every rank to the same number of sequences with idle ones. Needed when weights are
    sharded, because every rank must take part in every forward pass.
    """
    rank_rows = row_shares(rows, count, work)
    own_packs = packs(rank_rows[rank], capacity)
    pack_count = (
        max(
            len(best_fit([len(row["input_ids"]) for row in conversations], capacity))
            for conversations in rank_rows
        )
        if equal_count
        else len(own_packs)
    )
    return own_packs + [IDLE] * (pack_count - len(own_packs))


def rank_layouts(
    rows: list[dict[str, Any]], rank: int, count: int, capacity: int, work: Operations
) -> list[Documents]:
    """The positions of the documents in the packs of `rank_packs`, without building the packs."""
    sizes = [len(row["input_ids"]) for row in row_shares(rows, count, work)[rank]]
    return [Documents(tuple(sizes[i] for i in group)) for group in best_fit(sizes, capacity)]


def trained_tokens(rows: list[dict[str, Any]]) -> int:
    """The number of trained tokens: all labelled ones except a document's first, which nothing predicts."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def unfilled_share(order: Order, capacity: int, steps: int) -> float:
    """The share of empty space in the packed sequences of a run, without the last sequence of each step."""
    room, used = 0, 0
    for number in range(steps):
        chosen = [order.lengths[row] for row in order.step(number)]
        groups = best_fit(chosen, capacity)
        room += capacity * (len(groups) - 1)
        used += sum(chosen[i] for group in groups[:-1] for i in group)
    return 1 - used / room if room else 0.0
