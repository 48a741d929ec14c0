"""Activation maxima of every quantised linear: one forward pass over real conversations, one layer at a time.

Conversations are packed and go through the layers together; only the current layer is in memory
(model/walk.py). Experts run as grouped products and keep one maximum per expert.
`stages/quantize/reference.py` does the same with ModelOpt.
"""

from __future__ import annotations

import itertools
import types
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from model import layouts, walk
from model.families import registry
from model.layers import experts
from model.layers.grouped import Routing
from model.layers.projection import Projection
from model.weights.checkpoint import Checkpoint
from stages import dataset, job
from stages.job import StageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from model.layers.structure import Stacks


def conversations(rows: Path, count: int, tokens: int) -> list[torch.Tensor]:
    """Up to `count` training conversations of at most `tokens` tokens, spread evenly over the file; int64
    (length,) each.
    """
    chosen = itertools.islice(dataset.read(rows, step=max(1, dataset.count(rows) // count)), count)
    return [torch.tensor(row["input_ids"][:tokens]) for _, row in chosen]


class Maxima:
    """The largest absolute input of each projection of a block: float32 (experts,), zero for an expert that
    got no token.
    """

    def __init__(self, block: nn.Module):
        self.maxima: dict[str, torch.Tensor] = {}
        self._handles, self._stacks = [], []
        for name, module in block.named_modules():
            if isinstance(module, Projection) and module.experts == 1:
                self._handles.append(
                    module.register_forward_pre_hook(
                        lambda _, inputs, name=name: self._update(name, inputs[0].abs().amax().view(1))
                    )
                )
            elif experts.holds_stacks(module):
                module.forward = types.MethodType(self._recording_forward(name), module)
                self._stacks.append(module)

    def _update(self, name: str, values: torch.Tensor) -> None:
        values = values.float()
        self.maxima[name] = torch.maximum(self.maxima[name], values) if name in self.maxima else values

    def _recording_forward(
        self, name: str
    ) -> Callable[[Stacks, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        def forward(
            module: Stacks, hidden: torch.Tensor, index: torch.Tensor, share: torch.Tensor
        ) -> torch.Tensor:
            up, down = experts.stacks(module)
            routing = Routing.of(index, up.experts)
            y, u = experts.run(hidden, routing, share, up, down)
            expert = index.flatten()[routing.order]
            # down's input is relu(u) squared, so its maximum is the square of u's largest positive value.
            largest = (hidden.abs().amax(-1)[routing.token], u.relu().amax(-1).square())
            for part, rows in zip(experts.STACKS, largest, strict=True):
                self._update(
                    f"{name}.{part}",
                    rows.new_zeros(up.experts).scatter_reduce_(0, expert, rows, "amax"),
                )
            return y

        return forward

    def close(self) -> None:
        """Removes the hooks and restores the block's own forward functions."""
        for handle in self._handles:
            handle.remove()
        for module in self._stacks:
            del module.forward


@torch.no_grad()
def maxima(
    source: Checkpoint, layout: str, rows: list[torch.Tensor], device: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Hub name -> largest absolute input, float32 scalar, of each linear that `layout` quantises; and the
    names of idle experts.

    An idle expert got no token; it takes the largest maximum of its layer. Raises StageError if a maximum is
    not a positive number.
    """
    # A CPU emulates BF16 products, which is several times slower than float32.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    linears, largest, idle_names = layouts.linears(source.config, layout), {}, []
    layers = walk.Layers(source.config, dtype, device)
    activations = walk.Walk(
        walk.packed(rows), source.tensor(registry.of(source.config).embeddings), dtype, device
    )
    for number in range(len(layers)):
        block = layers.fill(number, source.tensor)
        block_maxima = Maxima(block)
        activations.through(block)
        block_maxima.close()
        for linear in (linear for linear in linears if linear.layer == number):
            name, values = linear.name, block_maxima.maxima[linear.part].cpu()
            largest[name] = values[linear.index or 0]
            if not largest[name]:
                idle_names.append(name)
                largest[name] = values.max()
            if not (torch.isfinite(largest[name]) and largest[name] > 0):
                raise StageError(
                    f"the activations of {name} have the maximum {largest[name].item()}",
                    "a positive number",
                    "The calibration conversations never reach that layer, or the model overflows: check the"
                    " data and the merged model.",
                )
        job.progress(number + 1, len(layers), "layers", f"calibrating on {sum(map(len, rows)):,} tokens")
    return largest, idle_names
