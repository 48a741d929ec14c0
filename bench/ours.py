"""The rows `ours`: this project's training path behind the interface that `bench.train_step` measures."""

from __future__ import annotations

import torch
from torch import nn

from bench.operations import Recipe
from bench.row import Row
from nemotron import adapter, assemble, recompute
from nemotron.documents import Documents

RANK, ALPHA = 16, 32
NAMES = {"linear_attention": "mamba", "full_attention": "attention", "moe": "experts"}


class Packed(Row):
    """The step's documents end to end in one sequence, adapters float32, everything else as stage train does it."""

    def step(self, ids: torch.Tensor, labels: torch.Tensor) -> float:
        count = (labels[:, 1:] != -100).sum()
        labels = labels.clone()
        labels[:, 0] = -100  # nothing stands before it
        loss = assemble.loss(self.model, ids.flatten(), labels.flatten(), Documents((ids.shape[1],) * len(ids))) / count
        loss.backward()
        nn.utils.clip_grad_norm_(self.adapters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def ours(config: dict, device: torch.device, form: str = "nf4", targets: str = "all") -> Row:
    """A model of `config` with random weights in `form` and LoRA on `targets`, ready for `Row.step`.

    `form` "rounded" is BF16 with adapted weights going through the export's rounding in every step.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = assemble.random(config, "bf16" if form == "rounded" else form, dtype, str(device))
    adapter.attach(model, targets, RANK, ALPHA, 0)
    for module in assemble.exported(model):
        module.rounded = form == "rounded"
    recompute.attach(model.train())
    parts = []
    for block in model.model.layers:
        name = NAMES[block.block_type]
        parts.append((name, block))
        if name == "experts":
            parts += [("experts/routed", block.mixer.experts), ("experts/shared", block.mixer.shared_experts)]
    part = frozenset({"attention", "mamba", "experts", "shared"} if targets == "all" else {targets})
    return Packed(model, None, Recipe(down_recomputed=False, logits="trained", scores="group", targets=part, rank=RANK), parts, f"{form}, LoRA on {targets}, one packed sequence")
