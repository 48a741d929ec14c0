"""The loss of quality through quantisation: compares the quantised model with its source on held-out
conversations, before anything is served.

Both models go through the layers side by side (model/walk.py), the quantised one with its dequantised
weights. Activations are not rounded here, and Marlin does not round them either. The additional error of W4A4
shows in stage evaluate.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from model import walk
from model.families import registry
from model.labels import IGNORED
from model.weights import nvfp4
from model.weights.checkpoint import Checkpoint
from stages import dataset, job
from stages.job import StageError


def held_out_rows(path: Path, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first held-out conversations, at most `tokens` tokens: ids, and the label of each next token, both
    int64 (length,).

    Raises StageError if none of these tokens is trained.
    """
    chosen, remaining = [], tokens
    for _, row in dataset.read(path):
        ids = torch.tensor(row["input_ids"])[:remaining]
        following = torch.tensor([*row["labels"][1:], IGNORED])[:remaining]
        chosen.append((ids, following))
        remaining -= len(ids)
        if remaining < 1:
            break
    if not any((following != IGNORED).any() for _, following in chosen):
        raise StageError(
            f"{path.name} has no trained token in its first {tokens}",
            "the assistant's tokens",
            "Raise fidelity_tokens, or hold out more conversations in stage data",
        )
    return chosen


def dequantising_reader(quantised: Checkpoint) -> walk.Read:
    """A function that reads a tensor of a quantised checkpoint, with quantised weights as float32."""

    def read(name: str) -> torch.Tensor:
        stem = name.removesuffix(".weight")
        if f"{stem}.weight_scale" not in quantised.entries:
            return quantised.tensor(name)
        return nvfp4.unpack(
            nvfp4.Packed(
                *(quantised.tensor(f"{stem}.{part}") for part in ("weight", "weight_scale", "weight_scale_2"))
            )
        )

    return read


@torch.no_grad()
def measure(
    source: Checkpoint, quantised: Checkpoint, rows: list[tuple[torch.Tensor, torch.Tensor]], device: str
) -> dict[str, Any]:
    """The loss of both models (nats per trained token), KL(source || quantised) in nats, the share of equal
    greedy tokens, and the relative error after each layer.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sequences = walk.packed([ids for ids, _ in rows])
    layers = walk.Layers(source.config, dtype, device)
    family = registry.of(source.config)
    embeddings = source.tensor(family.embeddings)
    read = dequantising_reader(quantised)
    before, after = (walk.Walk(sequences, embeddings, dtype, device) for _ in range(2))
    errors = []
    for number in range(len(layers)):
        before.through(layers.fill(number, source.tensor))
        after.through(
            layers.fill(
                number, read, [name for name in layers.names(number) if f"{name}_scale" in quantised.entries]
            )
        )
        errors.append(after.distance(before) / before.distance())
        job.progress(number + 1, len(layers), "layers", "comparing with the source")
    norm, head = source.tensor(family.final_norm), source.tensor(family.head)
    eps = family.epsilon(source.config)
    following = torch.cat([labels for _, labels in rows]).to(device)
    return logit_figures(before.logits(norm, head, eps), after.logits(norm, head, eps), following) | {
        "layers": [round(error, 5) for error in errors]
    }


def logit_figures(
    before: Iterable[torch.Tensor], after: Iterable[torch.Tensor], following: torch.Tensor
) -> dict[str, Any]:
    """Loss, KL and greedy agreement of two streams of logits (n, vocabulary). `following` are the labels of
    the next tokens; only trained ones count.
    """
    count = agree = offset = 0
    sums = {"source": 0.0, "quantised": 0.0, "kl": 0.0}
    for source_logits, quantised_logits in zip(before, after, strict=True):
        targets = following[offset : offset + len(source_logits)]
        offset += len(source_logits)
        trained = targets != IGNORED
        p, q = (logits[trained].log_softmax(-1) for logits in (source_logits, quantised_logits))
        sums["source"] += F.nll_loss(p, targets[trained], reduction="sum").item()
        sums["quantised"] += F.nll_loss(q, targets[trained], reduction="sum").item()
        sums["kl"] += F.kl_div(q, p, reduction="sum", log_target=True).item()
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    means = {name: value / count for name, value in sums.items()}
    return {
        "tokens": count,
        "loss": {name: means[name] for name in ("source", "quantised")},
        "kl": means["kl"],
        "greedy_agreement": agree / count,
    }
