"""The training loop: packed steps, the exact mean over a step's trained tokens, a learning rate schedule,
held-out losses, and checkpoints.

A step depends only on the seed and its number (stages/train/pack.py), on the adapter, and on the optimiser's
state, which are all float32. So a run that was killed and resumed logs the same losses as an uninterrupted
one, also if it resumes with another number of ranks.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model import adapter, assemble
from model.families import registry
from stages import job
from stages.job import Job, StageError
from stages.train import checkpoints
from stages.train.guard import Guard, first_not_finite
from stages.train.pack import Order, Pack, rank_layouts, rank_packs, trained_tokens
from stages.train.parameters import Parameters
from stages.train.ranks import Ranks
from stages.train.stop import listening, stopped
from stages.train.teacher import Teacher

if TYPE_CHECKING:
    from model.layers.structure import Model
    from stages.train.watch import Watch


@dataclass
class History:
    """Measurements by step, from 1; `held_out` also has step 0, the base's loss. `best` is (held-out loss,
    step) of the best adapter so far. `stopped` is the step of an early stop.
    """

    train: dict[int, float] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    norm: dict[int, float] = field(default_factory=dict)
    rate: dict[int, float] = field(default_factory=dict)
    best: tuple[float, int] | None = None
    stopped: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields, as history.json of a checkpoint holds them."""
        return dict(vars(self))

    @staticmethod
    def from_json(raw: dict[str, Any]) -> History:
        """The history in a checkpoint's history.json, whose keys of steps are text."""
        numbered = {
            name: {int(step): value for step, value in raw[name].items()}
            for name in ("train", "held_out", "norm", "rate")
        }
        return History(**numbered, best=tuple(raw["best"]) if raw["best"] else None, stopped=raw["stopped"])


def rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """The learning rate of step `step` (from 0): it rises linearly over `warmup` steps, then falls along half
    a cosine to zero at `steps`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Loop:
    """One run over `rows`.

    `before_step(step)` runs before each step and returns True if it changed the model (for example, turned
    rounding on). Once the teacher's outputs are recorded, gradients come from them; the reported and stored
    loss is always the label loss. `watch` is called with every step and held-out loss
    (stages/train/watch.py); it may be None.
    """

    def __init__(
        self,
        task: Job,
        model: Model,
        rows: list[dict[str, Any]],
        held_out: list[dict[str, Any]],
        ranks: Ranks,
        before_step: Callable[[int], bool] = lambda step: False,
        teacher: Teacher | None = None,
    ):
        self.task, self.params = task, task.parameters(Parameters)
        self.model = model
        self.rows = rows
        self.ranks = ranks
        self.before_step = before_step
        self.teacher = teacher
        self.watch: Watch | None = None
        lengths = [len(row["input_ids"]) for row in rows]
        self.order = Order(lengths, task.seed, self.params.batch, self.params.batch_tokens)
        self.work = registry.of(model.hub_config).operations(
            model.hub_config, self.params.gradient_checkpointing
        )
        self.held_out, self.held_out_tokens = (
            self.packs(held_out) if held_out else [],
            trained_tokens(held_out),
        )
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=0.0, weight_decay=self.params.weight_decay, fused=True
        )
        self.history, self.start = History(), 0
        self.guard = Guard(self.parameters)

    def run(self) -> History:
        """Trains from `start` to the last step, or until the held-out loss stops falling. Afterwards the
        model has the best adapter.

        Raises StageError after a signal to stop, once the step under way is done and its checkpoint saved.

        The held-out loss is measured before the first step too, which is the base's own loss. A run of no
        steps measures only that.
        """
        params = self.params
        self.model.train()
        graphs = params.cuda_graphs and self.task.device == "cuda" and not params.sharded
        if not self.start and self.held_out_tokens:
            self.evaluate(0)
        with listening() as stop:
            for step in range(self.start, params.steps):
                if self.history.stopped:
                    break
                changed = self.before_step(step)
                if graphs and (changed or step == self.start):
                    self.capture(step)
                if changed:
                    # losses of the unrounded and the rounded model are not comparable
                    self.history.best = None
                    if self.teacher:
                        for state in self.optimizer.state.values():
                            # exp_avg points towards the labels; exp_avg_sq, which scales steps, stays valid
                            state["exp_avg"].zero_()
                self.step(step)
                done = step + 1
                if self.held_out_tokens and (done % params.eval_every == 0 or done == params.steps):
                    self.evaluate(done)
                asked = self.ranks.any(stop.asked, self.task.device)
                if done % params.save_every == 0 or done == params.steps or self.history.stopped or asked:
                    self.save(done)
                if asked:
                    raise stopped(done, params.steps)
        if self.history.best and self.history.best[1] != max(self.history.train, default=0):
            adapter.restore(self.model, load_file(self.best_file))
        return self.history

    def capture(self, start: int) -> None:
        """Captures the CUDA graphs of every packed layout in the steps from `start` on; the rows of each step
        are known.
        """
        params, packs = self.params, set()
        for number in range(start, params.steps):
            rows = [self.rows[row] for row in self.order.step(number)]
            packs |= set(
                rank_layouts(rows, self.ranks.rank, self.ranks.world, params.sequence_tokens, self.work)
            )
        graphs = getattr(self.model, "graphs", None) or assemble.capture(self.model)
        graphs.prepare(
            packs, lambda done, total: job.progress(done, total, "graphs", "capturing CUDA graphs")
        )

    def step(self, number: int) -> None:
        """One optimiser step; `number` from 0."""
        params, began = self.params, time.monotonic()
        rows = [self.rows[row] for row in self.order.step(number)]
        count = trained_tokens(rows)
        total = torch.zeros((), device=self.task.device)
        packs = self.packs(rows)
        for pack in packs:
            objective, label_loss = self.losses(pack)
            (objective / count).backward()
            total += label_loss.detach() / count
        gradients = []
        for p in self.parameters.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)  # this rank had no conversation; the guard checks the sum
            gradients.append(p.grad)
        self.ranks.sum([total, *gradients])
        value = total.item()
        if not math.isfinite(value):
            raise StageError(
                f"loss is {value} at step {number + 1}, first in"
                f" {first_not_finite(self.model, lambda: [self.loss(pack) for pack in packs])}",
                "a finite loss",
                "Lower learning_rate or max_grad_norm",
            )
        norm = self.guard.check_gradients(number)
        nn.utils.clip_grads_with_norm_(self.parameters.values(), params.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(number, params.steps, params.warmup_steps, params.learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.check_movement()
        done = number + 1
        self.history.train[done] = value
        self.history.norm[done] = norm.item()
        self.history.rate[done] = self.optimizer.param_groups[0]["lr"]
        if self.watch:
            self.watch.step(
                self.history, done, sum(len(row["input_ids"]) for row in rows), time.monotonic() - began
            )

    def packs(self, rows: list[dict[str, Any]]) -> list[Pack]:
        """This rank's share of `rows`, packed."""
        params, ranks = self.params, self.ranks
        return rank_packs(rows, ranks.rank, ranks.world, params.sequence_tokens, params.sharded, self.work)

    def losses(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss to differentiate (from the teacher, or the label loss) and the label loss. Both are sums
        over the pack's trained tokens.
        """
        if not (self.teacher and self.teacher.recorded and pack.rows):
            return (self.loss(pack),) * 2
        device = self.task.device
        return assemble.distillation(
            self.model,
            pack.ids.to(device),
            pack.labels.to(device),
            pack.documents,
            *self.teacher.targets(pack),
        )

    def loss(self, pack: Pack) -> torch.Tensor:
        """The label loss, a sum over the pack's trained tokens."""
        device = self.task.device
        return assemble.loss(self.model, pack.ids.to(device), pack.labels.to(device), pack.documents)

    @torch.no_grad()
    def evaluate(self, done: int) -> None:
        """Measures the held-out loss after step `done`. That of step 0 is the base's. It takes no part in the
        choice of the best adapter, unless nothing is trained.
        """
        self.model.eval()
        total = torch.zeros((), device=self.task.device)
        for pack in self.held_out:
            total += self.loss(pack)
        self.ranks.sum([total])
        self.model.train()
        value = total.item() / self.held_out_tokens
        if not math.isfinite(value):
            raise StageError(
                f"held-out loss is {value} at step {done}",
                "a finite loss",
                "Lower learning_rate or max_grad_norm",
            )
        self.history.held_out[done] = value
        if self.watch:
            self.watch.held_out(value, done)
        if done or not self.params.steps:
            self.compare(value, done)

    def compare(self, value: float, done: int) -> None:
        """Saves a new best adapter, or sets the early stop, from the held-out loss after step `done`."""
        history = self.history
        if history.best is None or value < history.best[0]:
            history.best = (value, done)
            if self.ranks.first:
                save_file(adapter.state(self.model), self.best_file)
        elif self.params.patience and done - history.best[1] >= self.params.patience * self.params.eval_every:
            history.stopped = done

    @property
    def best_file(self) -> Path:
        """Where the best adapter so far is saved."""
        return self.task.scratch / "best.safetensors"

    def save(self, done: int) -> None:
        """Writes a checkpoint after step `done`, and deletes the oldest ones."""
        if self.ranks.first:
            with checkpoints.saving(self.task.scratch, done) as folder:
                save_file(adapter.state(self.model), folder / adapter.WEIGHTS)
                torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
                if self.history.best:
                    (folder / "best.safetensors").write_bytes(self.best_file.read_bytes())
                (folder / "history.json").write_text(json.dumps(self.history.as_json()))
        self.ranks.wait()

    def resume(self, folder: Path) -> None:
        """Continues from a whole checkpoint."""
        adapter.load(self.model, folder)
        self.optimizer.load_state_dict(
            torch.load(folder / "optimizer.pt", map_location=self.task.device, weights_only=True)
        )
        self.history = History.from_json(json.loads((folder / "history.json").read_text()))
        if self.history.best and self.ranks.first:
            self.best_file.write_bytes((folder / "best.safetensors").read_bytes())
        self.ranks.wait()
        self.start = checkpoints.step_number(folder)
