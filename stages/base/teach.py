"""Teaches the tiny base its manners: plain full training on the lessons, as fast as two cores allow."""

from __future__ import annotations

import math
import random
import time

import torch
from torch import nn
from torch.nn import functional as F

from nemotron.chat import IGNORED, PAD, Rendered
from stages import job


def batches(rows: list[Rendered], tokens: int, shuffle: random.Random) -> list[list[Rendered]]:
    """Rows of like length together, at most `tokens` tokens with their padding, in random order."""
    ordered = sorted(rows, key=lambda row: (len(row.input_ids), shuffle.random()))
    made: list[list[Rendered]] = [[]]
    for row in ordered:
        if made[-1] and (len(made[-1]) + 1) * len(row.input_ids) > tokens:
            made.append([])
        made[-1].append(row)
    shuffle.shuffle(made)
    return made


def loss(model: nn.Module, batch: list[Rendered]) -> torch.Tensor:
    """Mean cross-entropy over the trained tokens; logits are formed for those alone."""
    length = max(len(row.input_ids) for row in batch)
    ids = torch.tensor([row.input_ids + [PAD] * (length - len(row.input_ids)) for row in batch])
    labels = torch.tensor([row.labels + [IGNORED] * (length - len(row.labels)) for row in batch])[:, 1:]
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    trained = labels != IGNORED
    return F.cross_entropy(model.lm_head(hidden[trained]), labels[trained])


def teach(model: nn.Module, rows: list[Rendered], epochs: int, learning_rate: float, tokens: int, seed: int) -> float:
    """Trains in place; returns the mean loss of the last epoch. One-cycle cosine with warm-up, AdamW."""
    shuffle = random.Random(seed)
    steps = sum(len(batches(rows, tokens, random.Random(epoch))) for epoch in range(epochs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    step, seen, began, last = 0, 0, time.monotonic(), 0.0
    model.train()
    for _ in range(epochs):
        total, parts = 0.0, batches(rows, tokens, shuffle)
        for batch in parts:
            warm = min(1.0, (step + 1) / 20)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
            value = loss(model, batch)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += value.item()
            step += 1
            seen += sum(len(row.input_ids) for row in batch)
            job.metric("loss", value.item(), step)
            job.progress(step, steps, "step", f"loss {value.item():.2f}, {seen / (time.monotonic() - began):,.0f} tokens/s")
        last = total / len(parts)
    model.eval()
    return last
