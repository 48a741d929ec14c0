"""Distillation through the rounding (QAD): the rounded model learns the outputs of the unrounded one.

The teacher is the adapter as trained so far, on the unrounded base. Its most likely tokens at every trained
token are recorded once. So later steps cost no more than others, and no second model is held in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model import assemble
from model.families import registry
from model.labels import IGNORED
from stages import job
from stages.job import Job, StageError
from stages.train import checkpoints
from stages.train.pack import Pack, rank_packs
from stages.train.parameters import Parameters
from stages.train.ranks import Ranks

if TYPE_CHECKING:
    from model.layers.structure import Model

TOP = 64  # most likely tokens that are recorded for each trained token, 0.5 KB together


class Teacher:
    """Call `record`, then `targets(pack)`. Every rank writes its share of the rows into scratch and reads all
    shares.
    """

    def __init__(self, task: Job, ranks: Ranks):
        self.task, self.ranks = task, ranks
        self.recorded: dict[int, dict[str, torch.Tensor]] = {}

    def record(self, model: Model, rows: list[dict[str, Any]], begins: bool) -> None:
        """Records the model's outputs on all rows. The model must be unrounded now. A resumed run reads what
        the first one wrote.

        Raises StageError if a resumed run finds nothing to read: the adapter has changed since rounding
        began.
        """
        files = sorted(self.task.scratch.glob("teacher-*-of-*.safetensors"))
        complete = {
            f"teacher-{rank}-of-{int(file.stem.rsplit('-', 1)[1])}.safetensors"
            for file in files
            for rank in range(int(file.stem.rsplit("-", 1)[1]))
        }
        if not files or complete != {file.name for file in files}:
            if not begins:
                raise _lost("no teacher in scratch")
            self._write(model, rows)
            self.ranks.wait()
        for file in self.task.scratch.glob("teacher-*-of-*.safetensors"):
            for name, value in _read(file).items():
                number, part = name.split(".")
                self.recorded.setdefault(int(number), {})[part] = value

    @torch.no_grad()
    def _write(self, model: Model, rows: list[dict[str, Any]]) -> None:
        model.eval()
        tensors: dict[str, torch.Tensor] = {}
        device = self.task.device
        params, ranks = self.task.parameters(Parameters), self.ranks
        work = registry.of(model.hub_config).operations(model.hub_config, params.gradient_checkpointing)
        packs = rank_packs(rows, ranks.rank, ranks.world, params.sequence_tokens, params.sharded, work)
        for number, pack in enumerate(packs, 1):
            index, logs = assemble.likeliest_tokens(
                model,
                pack.ids.to(device),
                pack.labels.to(device),
                pack.documents,
                min(TOP, model.lm_head.weight.shape[0] - 1),
            )
            sizes = [
                int((labels[1:] != IGNORED).sum()) for labels in pack.labels.split(pack.documents.lengths)
            ]
            # an idle pack has no rows
            for row, i, p in zip(pack.rows, index.split(sizes), logs.split(sizes), strict=False):
                tensors |= {f"{row}.index": i.to("cpu", torch.int32), f"{row}.logs": p.cpu()}
            job.progress(number, len(packs), "sequences", "asking the teacher")
        file = self.task.scratch / f"teacher-{self.ranks.rank}-of-{self.ranks.world}.safetensors"
        save_file({name: value.contiguous() for name, value in tensors.items()}, file.with_suffix(".new"))
        checkpoints.put(file.with_suffix(".new"), file)
        model.train()

    def targets(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's token indices, int64 (n, k), and log-probabilities, float32 (n, k + 1), for the n
        trained tokens of a packed sequence, in their order.
        """
        rows = [self.recorded[row] for row in pack.rows]
        index, logs = (
            torch.cat([row[part] for row in rows]).to(self.task.device) for part in ("index", "logs")
        )
        return index, logs


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise _lost(f"{file.name} is damaged ({error})") from error


def _lost(found: str) -> StageError:
    return StageError(
        found, "what was written when rounding set in", "Delete this stage's scratch folder and train anew"
    )
