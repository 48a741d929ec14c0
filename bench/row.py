"""What all measured ways of training share: a step, the parts that a profile names, and random weights that
are packed at once.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from bench.lengths import Conversation
from bench.operations import Workload
from model.labels import IGNORED


class DoesNotFit(RuntimeError):
    """The device cannot hold the weights of this way of training; the message says how much they need."""


class Row:
    """One way of training. `step` runs a whole optimizer step. `parts` names the modules of a profile.

    A micro-batch has `micro` conversations, padded to the longest of them. `loss_of(ids, labels, mask)` is
    the mean loss of one. ids, labels and mask are int64 (rows, T). The mask is 0 on padding, and None if
    nothing is padded.
    """

    micro = 1
    pads = False  # True: `micro` may be set, which is up to who trains this way

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[..., Any],
        workload: Workload,
        parts: Iterable[tuple[str, nn.Module]],
        note: str = "",
    ) -> None:
        self.model = model
        self.loss_of = loss_of
        self.workload = workload
        self.parts = list(parts)
        self.note = note
        self.adapters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.adapters[0].device
        self.optimizer = torch.optim.AdamW(self.adapters, lr=2e-5, fused=self.device.type == "cuda")

    @property
    def described(self) -> str:
        return f"micro-batches of {self.micro}" + (f"; {self.note}" if self.note else "")

    def prepare(self, plan: list[tuple[int, ...]]) -> None:
        """Called once before the steps of a run, with the lengths of each step. Subclasses do their
        preparation here.
        """

    def computed(self, lengths: Sequence[int]) -> list[int]:
        """Lengths of the sequences that a step computes, including padding. `lengths`: those of its
        conversations.
        """
        return [max(micro_batch) for micro_batch in self._micro_batches(lengths) for _ in micro_batch]

    def passes(self, lengths: Sequence[int]) -> int:
        """Micro-batches of a step."""
        return len(self._micro_batches(lengths))

    def step(self, conversations: Sequence[Conversation]) -> float:
        """Runs one optimizer step on the mean loss over the trained tokens, and returns that loss."""
        count, total = (
            sum(conversation.trained for conversation in conversations),
            torch.zeros((), device=self.device),
        )
        for micro_batch in self._micro_batches(conversations):
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.loss_of(*padded(micro_batch)) * (
                    sum(conversation.trained for conversation in micro_batch) / count
                )
            loss.backward()
            total += loss.detach()
        self.update()
        return float(total)

    def update(self) -> None:
        """Clips the gradients, runs the optimizer and drops the gradients."""
        nn.utils.clip_grad_norm_(self.adapters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _micro_batches(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        return [items[start : start + self.micro] for start in range(0, len(items), self.micro)]

    def close(self) -> None:
        """Frees everything the row holds on the device."""
        del self.model, self.loss_of, self.optimizer, self.adapters, self.parts
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def padded(micro_batch: Sequence[Conversation]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """ids, labels and mask of a micro-batch, as in `Row`."""
    ids = nn.utils.rnn.pad_sequence([conversation.ids for conversation in micro_batch], batch_first=True)
    labels = nn.utils.rnn.pad_sequence(
        [conversation.labels for conversation in micro_batch], batch_first=True, padding_value=IGNORED
    )
    lengths = torch.tensor([len(conversation.ids) for conversation in micro_batch])
    if int(lengths.min()) == ids.shape[1]:
        return ids, labels, None
    return ids, labels, (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(ids.device)


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random(
    *shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, std: float = 0.02
) -> torch.Tensor:
    return torch.empty(*shape, device=device, dtype=dtype).normal_(std=std)


def packed(into: int, out: int, device: torch.device) -> nn.Module:
    """A random (out, into) matrix packed by bitsandbytes: NF4, double quantisation, products in BF16."""
    import bitsandbytes as bnb

    with torch.device("meta"):
        module = bnb.nn.Linear4bit(
            into, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
        )
    return pack(module, device)


def pack(module: Any, device: torch.device) -> nn.Module:
    """Gives a Linear4bit on meta a random packed weight on `device`."""
    import bitsandbytes as bnb

    weight = random(module.out_features, module.in_features, device=device)
    params: Any = bnb.nn.Params4bit
    module.weight = params(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=module
    ).to(device)
    module.support_avx512bf16_for_cpu = False  # else evaluating repacks in place and cuts later gradients
    packed_module: nn.Module = module
    return packed_module


def start_dt(heads: int, device: torch.device, config: dict[str, Any]) -> torch.Tensor:
    """dt_bias (heads,) whose softplus is spread log-uniformly between the config's limits."""
    low, high = math.log(config["time_step_min"]), math.log(config["time_step_max"])
    dt = (torch.rand(heads, device=device) * (high - low) + low).exp()
    return dt + torch.log(-torch.expm1(-dt))
