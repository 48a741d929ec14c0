"""What every measured way of training has in common: a step, the parts a profile names, and random weights made packed."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from bench.operations import Recipe


class DoesNotFit(RuntimeError):
    """The device cannot hold the weights of this way of training; the message says what it needs."""


class Row:
    """One way of training. `step` does a whole optimizer step, `parts` names the modules a profile is told by."""

    slow = False  # True: too slow for several steps, so a micro-batch warms up and one step is measured

    def __init__(self, model: nn.Module, loss_of: Callable, recipe: Recipe, parts: Iterable[tuple[str, nn.Module]], note: str = "") -> None:
        self.model, self.loss_of, self.recipe, self.parts, self.note = model, loss_of, recipe, list(parts), note
        self.adapters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.adapters[0].device
        self.optimizer = torch.optim.AdamW(self.adapters, lr=2e-5, fused=self.device.type == "cuda")

    def step(self, ids: torch.Tensor, labels: torch.Tensor) -> float:
        """Mean loss over micro-batches. ids and labels (rows, T) int64, one micro-batch a row; labels lie on their own tokens, -100 is not trained."""
        found = torch.zeros((), device=self.device)
        for row in range(len(ids)):
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.loss_of(ids[row : row + 1], labels[row : row + 1]) / len(ids)
            loss.backward()
            found += loss.detach()
        nn.utils.clip_grad_norm_(self.adapters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(found)

    def close(self) -> None:
        """Frees everything the row holds on the device."""
        self.model = self.loss_of = self.optimizer = None
        self.adapters = self.parts = []
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, std: float = 0.02) -> torch.Tensor:
    return torch.empty(*shape, device=device, dtype=dtype).normal_(std=std)


def packed(into: int, out: int, device: torch.device) -> nn.Module:
    """A random (out, into) matrix as bitsandbytes packs it: NF4, scales packed again, products in BF16."""
    import bitsandbytes as bnb

    with torch.device("meta"):
        module = bnb.nn.Linear4bit(into, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True)
    return pack(module, device)


def pack(module: nn.Module, device: torch.device) -> nn.Module:
    """Gives a Linear4bit on meta a random packed weight on `device`."""
    import bitsandbytes as bnb

    weight = random(module.out_features, module.in_features, device=device)
    module.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=module).to(device)
    module.support_avx512bf16_for_cpu = False  # else evaluating repacks in place and cuts later gradients
    return module


def start_dt(heads: int, device: torch.device, config: dict) -> torch.Tensor:
    """dt_bias (heads,) whose softplus is spread log-uniformly between the config's limits."""
    low, high = math.log(config["time_step_min"]), math.log(config["time_step_max"])
    dt = (torch.rand(heads, device=device) * (high - low) + low).exp()
    return dt + torch.log(-torch.expm1(-dt))
