"""Which conversations a step trains on, and how they are laid into packed sequences.

Both follow from seed and step alone: a resumed run, and one with another number of ranks, goes on with exactly the rows that
an uninterrupted one would have had.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemotron.chat import IGNORED
from nemotron.documents import Documents


@dataclass(frozen=True)
class Pack:
    """One packed sequence: `ids` and `labels` int64 (tokens,), where its documents lie, and which rows of the data set they are."""

    ids: torch.Tensor
    labels: torch.Tensor
    documents: Documents
    rows: tuple[int, ...] = ()


IDLE = Pack(torch.zeros(1, dtype=torch.int64), torch.tensor([IGNORED]), Documents((1,)))  # has no loss, and passes through every layer


class Order:
    """An endless run through `count` rows, shuffled anew in every epoch."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._epoch, self._rows = -1, []

    def __getitem__(self, place: int) -> int:
        epoch, at = divmod(place, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._rows = epoch, torch.randperm(self.count, generator=generator).tolist()
        return self._rows[at]

    def step(self, number: int, size: int) -> list[int]:
        """The rows of step `number` (from 0), `size` of them."""
        return [self[place] for place in range(number * size, (number + 1) * size)]


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Groups of indices whose lengths sum to at most `capacity`, each length put where least room would be left, longest first.

    Raises ValueError if one length alone is over it.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > capacity:
            raise ValueError(f"row {index} has {lengths[index]} tokens, a packed sequence {capacity}")
        fitting = [g for g, left in enumerate(room) if left >= lengths[index]]
        if fitting:
            tightest = min(fitting, key=lambda g: room[g])
            groups[tightest].append(index)
            room[tightest] -= lengths[index]
        else:
            groups.append([index])
            room.append(capacity - lengths[index])
    return groups


def packs(rows: list[dict], capacity: int) -> list[Pack]:
    """The rows (`input_ids`, `labels`, `number`) end to end in as few sequences of at most `capacity` tokens as best fit finds."""
    made = []
    for group in best_fit([len(row["input_ids"]) for row in rows], capacity):
        ids = [i for g in group for i in rows[g]["input_ids"]]
        # Nothing stands before a document's first token: whatever is packed before it must not predict it.
        labels = [i for g in group for i in (IGNORED, *rows[g]["labels"][1:])]
        made.append(Pack(torch.tensor(ids), torch.tensor(labels), Documents(tuple(len(rows[g]["input_ids"]) for g in group)), tuple(rows[g]["number"] for g in group)))
    return made


def spread(rows: list[dict], count: int) -> list[list[dict]]:
    """The rows in `count` shares of about as many tokens: the longest first, each to the share that has least."""
    shares: list[list[dict]] = [[] for _ in range(count)]
    tokens = [0] * count
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        least = tokens.index(min(tokens))
        shares[least].append(row)
        tokens[least] += len(row["input_ids"])
    return shares


def share(rows: list[dict], rank: int, count: int, capacity: int, level: bool) -> list[Pack]:
    """The packed share of rank `rank` of `count`. `level`: every rank has as many sequences, the last of some idle, since each is one of all ranks."""
    shares = spread(rows, count)
    own = packs(shares[rank], capacity)
    most = max(len(best_fit([len(row["input_ids"]) for row in its], capacity)) for its in shares) if level else len(own)
    return own + [IDLE] * (most - len(own))


def layouts(lengths: list[int], rank: int, count: int, capacity: int) -> list[Documents]:
    """Where the documents lie in the packs of `share`, from the rows' lengths alone."""
    own = spread([{"input_ids": range(length)} for length in lengths], count)[rank]
    sizes = [len(row["input_ids"]) for row in own]
    return [Documents(tuple(sizes[i] for i in group)) for group in best_fit(sizes, capacity)]


def trained_tokens(rows: list[dict]) -> int:
    """Tokens that are predicted and trained: all labelled ones but a document's first."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def unfilled(lengths: list[int], seed: int, size: int, capacity: int, steps: int) -> float:
    """Share of the room of packed sequences, but for the last of each step, that stays empty over a run."""
    order, room, used = Order(len(lengths), seed), 0, 0
    for number in range(steps):
        chosen = [lengths[row] for row in order.step(number, size)]
        groups = best_fit(chosen, capacity)
        room += capacity * (len(groups) - 1)
        used += sum(chosen[i] for group in groups[:-1] for i in group)
    return 1 - used / room if room else 0.0
