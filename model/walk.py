"""Runs a model's forward with one layer in memory at a time: packed sequences pass through layer after layer,
and each layer is filled just before.

A 63 GB model then needs memory for its largest layer (2.6 GB) and the hidden states (5.4 KB a token in BF16).
Every layer is filled once, so a pass over hundreds of conversations reads the checkpoint once. Several models
that differ in some weights can run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from model import assemble
from model.families import registry
from model.families.family import Config
from model.layers.documents import Documents

if TYPE_CHECKING:
    from model.layers.structure import Model

CAPACITY = 16384  # tokens of a packed sequence
Sequence = tuple[torch.Tensor, Documents]  # ids int64 (tokens,), and their documents
Read = Callable[[str], torch.Tensor]  # the hub name of a tensor -> the tensor


class Layers:
    """The blocks of a model of `config`. One block of each kind exists, and one layer at a time is filled
    into it.
    """

    def __init__(self, config: Config, dtype: torch.dtype, device: str):
        self._family = family = registry.of(config)
        self.kinds = family.kinds(config)
        self._models: dict[str, Model] = {
            kind: assemble.prepare(
                assemble.empty(family.one_layer(config, kind), "bf16", dtype, device)
            ).eval()
            for kind in dict.fromkeys(self.kinds)
        }
        self._names: dict[int, list[str]] = {}
        for name in family.tensors(config):
            if (number := family.layer(name)) is not None:
                self._names.setdefault(number, []).append(name)

    def __len__(self) -> int:
        return len(self.kinds)

    def names(self, number: int) -> list[str]:
        """Hub names of the tensors of layer `number`."""
        return self._names[number]

    def fill(self, number: int, read: Read, only: Iterable[str] | None = None) -> nn.Module:
        """Fills the block of layer `number` and returns it. `read` gives each tensor; `only` restricts it to
        these names.
        """
        model = self._models[self.kinds[number]]
        for name in self.names(number) if only is None else only:
            assemble.fill(model, self._family.in_layer(name, 0), read(name))
        return model.model.layers[0]


class Walk:
    """Sequences passing through the layers. `hidden` holds (tokens, hidden size) of each, at first its
    embeddings.
    """

    def __init__(self, sequences: list[Sequence], embeddings: torch.Tensor, dtype: torch.dtype, device: str):
        """`embeddings` (vocabulary, hidden size); it is not kept."""
        table = embeddings.to(device, dtype)
        self.documents = [documents for _, documents in sequences]
        self.hidden = [F.embedding(ids.to(device), table) for ids, _ in sequences]

    @torch.no_grad()
    def through(self, block: nn.Module) -> None:
        """Runs every sequence through one filled block."""
        for n, (hidden, documents) in enumerate(zip(self.hidden, self.documents, strict=True)):
            self.hidden[n] = block(hidden[None], attention_mask=None, documents=documents)[0]

    def distance(self, other: Walk | None = None) -> float:
        """Frobenius norm of the difference to another walk's hidden states, over all sequences; of the hidden
        states themselves if `other` is None.
        """
        references: Iterable[torch.Tensor | float] = other.hidden if other else [0.0] * len(self.hidden)
        squares: float = sum(
            (a.float() - b).square().sum().item() for a, b in zip(self.hidden, references, strict=True)
        )
        root: float = squares**0.5
        return root

    @torch.no_grad()
    def logits(
        self, norm: torch.Tensor, head: torch.Tensor, eps: float, chunk: int = 1024
    ) -> Iterable[torch.Tensor]:
        """Logits float32 (at most `chunk`, vocabulary) of all tokens in order, a chunk at a time. norm
        (hidden size,), head (vocabulary, hidden size).
        """
        for hidden in self.hidden:
            head, norm = head.to(hidden), norm.to(hidden)
            for rows in hidden.split(chunk):
                yield (F.rms_norm(rows.float(), norm.shape, norm.float(), eps).to(rows) @ head.t()).float()


def packed(rows: list[torch.Tensor], capacity: int = CAPACITY) -> list[Sequence]:
    """Packs documents, ids int64 (tokens,) each, end to end in order into sequences of at most `capacity`
    tokens (or one document).
    """
    groups: list[list[torch.Tensor]] = []
    for row in rows:
        if not groups or sum(map(len, groups[-1])) + len(row) > capacity:
            groups.append([])
        groups[-1].append(row)
    return [(torch.cat(group), Documents(tuple(map(len, group)))) for group in groups]
