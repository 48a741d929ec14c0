"""The rows `ours`: this project's training, behind the interface that `bench.train_step` measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from bench.lengths import CAPACITY, Conversation
from bench.operations import Workload
from bench.row import Row
from model import adapter, assemble
from model.layers import recompute
from model.layers.documents import Documents
from stages.train.pack import best_fit

if TYPE_CHECKING:
    from model.layers.graphs import Graphs
    from model.layers.structure import Model

RANK, ALPHA = 16, 32
NAMES = {"linear_attention": "mamba", "full_attention": "attention", "moe": "experts"}


class Packed(Row):
    """Packs the step's conversations end to end into as few sequences as possible. Adapters are float32,
    everything else is as in stage train.

    `graphs` replays CUDA graphs, which `prepare` captures.
    """

    graphs: Graphs | None = None
    model: Model

    @property
    def described(self) -> str:
        return self.note

    def prepare(self, plan: list[tuple[int, ...]]) -> None:
        if self.graphs:
            self.graphs.prepare({Documents(pack) for lengths in plan for pack in self._packs(lengths)})

    def computed(self, lengths: Sequence[int]) -> list[int]:
        lengths_computed: list[int] = []
        for pack in self._packs(lengths):
            idle = self.graphs.key(Documents(pack)).tokens - sum(pack) if self.graphs else 0
            lengths_computed += [*pack, idle] if idle else pack
        return lengths_computed

    def passes(self, lengths: Sequence[int]) -> int:
        return len(self._packs(lengths))

    def step(self, conversations: Sequence[Conversation]) -> float:
        count, total = (
            sum(conversation.trained for conversation in conversations),
            torch.zeros((), device=self.device),
        )
        for group in best_fit([len(conversation.ids) for conversation in conversations], CAPACITY):
            pack = [conversations[number] for number in group]
            documents = Documents(tuple(len(conversation.ids) for conversation in pack))
            loss = (
                assemble.loss(
                    self.model,
                    torch.cat([conversation.ids for conversation in pack]),
                    torch.cat([conversation.labels for conversation in pack]),
                    documents,
                )
                / count
            )
            loss.backward()
            total += loss.detach()
        self.update()
        return float(total)

    def close(self) -> None:
        self.graphs = None
        super().close()

    @staticmethod
    def _packs(lengths: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple(lengths[number] for number in group) for group in best_fit(list(lengths), CAPACITY)]


def ours(
    config: dict[str, Any],
    device: torch.device,
    form: str = "nf4",
    targets: str = "all",
    graphs: bool = True,
    decoded: float = 0.0,
) -> Row:
    """A model of `config` with random weights in `form` and LoRA on `targets`, ready for `Row.step`.

    `form` "rounded" is BF16 with adapted weights going through the export's rounding in every step. `graphs`:
    use CUDA graphs on a GPU. `decoded`: bytes for weights that are kept decoded.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = assemble.random(config, "bf16" if form == "rounded" else form, dtype, str(device))
    adapter.attach(model, targets, RANK, ALPHA, 0)
    if decoded:
        assemble.keep_decoded(model, decoded)
    for module in assemble.exported(model):
        module.rounded = form == "rounded"
    recompute.attach(model.train(), CAPACITY)
    parts: list[tuple[str, torch.nn.Module]] = []
    for block in model.model.layers:
        name = NAMES[block.block_type]
        parts.append((name, block))
        if name == "experts":
            parts += [("experts/routed", block.mixer.experts), ("experts/shared", block.mixer.shared_experts)]
    adapted_parts = frozenset({"attention", "mamba", "experts", "shared"} if targets == "all" else {targets})
    workload = Workload(
        down_recomputed=False, logits="trained", scores="group", targets=adapted_parts, rank=RANK
    )
    row = Packed(
        model,
        assemble.loss,  # which its own `step` calls
        workload,
        parts,
        f"{form}, LoRA on {targets}, packed",
    )
    if graphs and device.type == "cuda":
        row.graphs = assemble.capture(model)
    return row
