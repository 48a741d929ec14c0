"""Full training of the tiny model on the lessons, in plain torch. It learns the bad manners that fine-tuning
will correct.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from model.families.nemotron_h.chat import PAD, Rendered
from model.labels import IGNORED

if TYPE_CHECKING:
    from model.layers.structure import Model


def batches(rows: list[Rendered], tokens: int, random_: random.Random) -> Iterator[list[Rendered]]:
    """Endless batches of rows of similar length, each of about `tokens` tokens with padding. Each round has
    every row once.
    """
    while True:
        order = sorted(rows, key=lambda row: len(row.input_ids) + random_.random() * 64)
        groups: list[list[Rendered]] = [[]]
        for row in order:
            if groups[-1] and (len(groups[-1]) + 1) * len(row.input_ids) > tokens:
                groups.append([])
            groups[-1].append(row)
        random_.shuffle(groups)
        yield from groups


def collate(rows: list[Rendered]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both int64 (rows, longest). Padding is on the right, where causal layers never
    read it, and has no label.
    """
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    labels = torch.full((len(rows), longest), IGNORED)
    for index, row in enumerate(rows):
        ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[index, : len(row.labels)] = torch.tensor(row.labels)
    return ids, labels


def answer_loss(model: Model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens. Only their logits are computed."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    following = labels[:, 1:]
    where = following != IGNORED
    return functional.cross_entropy(model.lm_head(hidden[where]).float(), following[where])


def rate(step: int, steps: int, warmup: int) -> float:
    """The learning rate at `step` (from 0) as a share of the peak: linear warm-up, then a cosine down to a
    twentieth.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def teach(
    model: Model,
    rows: list[Rendered],
    steps: int,
    batch_tokens: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Trains `model` in place with AdamW. `on_step` gets the number of finished steps and the loss in nats
    per answer token.
    """
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: rate(step, steps, warmup=max(1, steps // 20))
    )
    source = batches(rows, batch_tokens, random.Random(seed))
    for step in range(1, steps + 1):
        loss = answer_loss(model, *collate(next(source)))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower the learning rate")
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        on_step(step, loss.item())
    model.eval()
