"""One fine-tuning run: it reads a base and tokens, and writes an adapter and the loss curve.

The base is loaded into our own parts of the native class (model/assemble.py). Stage data has tokenised and
masked the rows, so training and serving use the same template. stages/train/loop.py is the loop. The router
is frozen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model import adapter, assemble
from model.families.family import FamilyError
from model.layers import determinism, kernel_watch, recompute
from model.weights.checkpoint import Checkpoint
from model.weights.shards import Shards
from stages import dataset, job
from stages.job import Job, StageError
from stages.train import checkpoints, limits, memory, ranks, report, sizes
from stages.train.board import Board
from stages.train.loop import Loop
from stages.train.pack import Order
from stages.train.parameters import Parameters
from stages.train.teacher import Teacher
from stages.train.watch import Watch

if TYPE_CHECKING:
    from model.layers.structure import Model


def run(task: Job) -> None:
    """Trains and writes `adapter/`, `training.json`, `loss.jsonl`, `loss.png` and `tensorboard/`."""
    began, params = time.monotonic(), task.parameters(Parameters)
    group = ranks.join(task.device)
    if task.device == "cpu":
        # Small matrices gain from a second core and lose from a third; a fixed number makes sums repeatable.
        torch.set_num_threads(max(1, 2 // group.world))
    if params.deterministic:
        determinism.enable()
    rows = read_rows(task.inputs["data"] / "train.jsonl")
    held_out = read_rows(task.inputs["data"] / "eval.jsonl", may_be_empty=True)
    if not held_out and group.first:
        job.warning(
            "no held-out conversation: there is no held-out loss, and the adapter of the last step is kept",
            "Nothing shows when training begins to learn by heart; with eval_share above 0 the best step is"
            " kept" + (", and patience has an effect" if params.patience else ""),
        )
    if task.device == "cuda":
        kernel_watch.start(report_kernels if group.first else lambda note: None)
    sizes.check_lengths(lengths(rows), lengths(held_out), params.sequence_tokens, params.batch_tokens)
    task, params = with_steps(task, rows, group)
    model = load_model(task, group)
    teacher = Teacher(task, group) if params.qat_loss == "teacher" else None
    loop = Loop(task, model, rows, held_out, group, rounding_schedule(task, model, rows, teacher), teacher)
    if checkpoint := newest_checkpoint(task.scratch):
        loop.resume(checkpoint)
    watch: Watch | None = None
    if group.first:
        sizes.warn_of_sizes(loop.order, params.steps, group.world, task.device)
        loop.watch = watch = Watch(
            params.steps, task.device, Board(task.output / "tensorboard", loop.history)
        )
    history = loop.run()
    if watch:
        watch.board.close()
        report.write_artifact(task, model, history, rows, loop.order, watch, time.monotonic() - began)


def with_steps(task: Job, rows: list[dict[str, Any]], group: ranks.Ranks) -> tuple[Job, Parameters]:
    """The job and its parameters with the number of steps that `epochs` ask for, if they are given. Tells the
    user both numbers.

    Raises StageError for parameters that do not go together.
    """
    params = task.parameters(Parameters)
    order = Order(lengths(rows), task.seed, params.batch, params.batch_tokens)
    if params.epochs:
        params = replace(params, steps=order.steps(params.epochs))
    limits.require(params, group.world, params.steps)
    if group.first:
        epochs = sizes.step_sizes(order, params.steps)["epochs"]
        job.progress(0, None, "", f"{params.steps} steps, {epochs:g} epochs of {len(rows)} conversations")
    return replace(task, params=asdict(params)), params


def read_rows(path: Path, may_be_empty: bool = False) -> list[dict[str, Any]]:
    """`input_ids` and `labels` of every row, lists of equal length, and the row's `number`. Raises StageError
    for an empty file unless `may_be_empty`.
    """
    rows = [
        {"input_ids": row["input_ids"], "labels": row["labels"], "number": n}
        for n, (_, row) in enumerate(dataset.read(path))
    ]
    if not rows and not may_be_empty:
        raise StageError(
            f"{path.name} has no rows",
            "at least one conversation",
            "Look at stats.json and rejects.jsonl of stage data",
        )
    return rows


def lengths(rows: list[dict[str, Any]]) -> list[int]:
    """The number of tokens of every row."""
    return [len(row["input_ids"]) for row in rows]


def load_model(task: Job, group: ranks.Ranks) -> Model:
    """The base with a new adapter on it; everything else is frozen. Raises StageError if that is not
    possible.
    """
    params = task.parameters(Parameters)
    form = memory.METHODS[params.method]
    shards = Shards(group.rank, group.world) if params.sharded else Shards()
    try:
        checkpoint = Checkpoint(task.inputs["base"])
        if packed := [name for name in checkpoint.entries if name.endswith("weight_scale_2")]:
            raise StageError(
                f"a base whose weights are in NVFP4 already ({packed[0]})",
                "the BF16 checkpoint",
                "Give stage base the BF16 checkpoint, and train with method nvfp4: it holds the weights on"
                " that very grid",
            )
        memory.check_rank(checkpoint.config, params)
        memory.check(checkpoint.config, params, task.device, shards.count)
        model = assemble.load(
            checkpoint,
            form,
            getattr(torch, params.precision),
            task.device,
            loading_progress(form) if group.first else None,
            shards,
        )
        adapt(model, params, task.seed)
    except (FamilyError, ValueError) as error:
        raise StageError(str(error), "libraries and a model that fit", "See the message") from error
    return model


def adapt(model: Model, params: Parameters, seed: int) -> None:
    """Adds a new adapter to a base, and sets up decoded weights and recomputation as the parameters say.

    Raises ValueError for targets that the model does not have, and StageError if no weights fit into
    `decoded_gb`.
    """
    adapter.attach(model, params.targets, params.rank, params.alpha, seed)
    if params.decoded_gb:
        count, size = assemble.keep_decoded(model, 1e9 * params.decoded_gb)
        if not count:
            raise StageError(
                f"decoded_gb {params.decoded_gb:g}, in which no weights fit decoded",
                "room for a stack of experts at least",
                "Raise decoded_gb, or leave it out",
            )
        job.progress(size / 1e9, size / 1e9, "GB", f"{count} stacks and linears are held decoded")
    if params.gradient_checkpointing:
        recompute.attach(model, params.sequence_tokens)


def report_kernels(note: str) -> None:
    """Reports to the user what model/layers/kernel_watch.py is tuning or has compiled."""
    job.progress(kernel_watch.counts.compiled, None, "kernels", note)


def loading_progress(form: str) -> Callable[[int, int], None]:
    """A callback for assemble.load. It reports every hundredth of the bytes, not each of thousands of
    tensors.
    """
    reported = -1

    def progress(done: int, total: int) -> None:
        nonlocal reported
        if 100 * done // total > reported:
            reported = 100 * done // total
            job.progress(done / 1e9, total / 1e9, "GB", f"loading the base as {form}")

    return progress


def rounding_schedule(
    task: Job, model: Model, rows: list[dict[str, Any]], teacher: Teacher | None
) -> Callable[[int], bool]:
    """The function that Loop calls before each step. In the last `qat_share` of the steps, adapted weights
    that the export quantises go through the export's rounding.

    The teacher is recorded just before the first rounded step. Raises StageError if there is a teacher but no
    rounded weight.
    """
    params = task.parameters(Parameters)
    first, exported = limits.first_rounded(params, params.steps), assemble.exported(model)
    if teacher and not exported:
        raise StageError(
            "qat_loss teacher with nothing to learn from it",
            "targets that the export quantises",
            "Choose targets experts or all, or leave qat_loss at labels",
        )

    def before_step(step: int) -> bool:
        if teacher and step >= first and not teacher.recorded:
            for module in exported:
                module.rounded = False
            teacher.record(model, rows, step == first)
        for module in exported:
            module.rounded = step >= first
        return step == first

    return before_step


def newest_checkpoint(scratch: Path) -> Path | None:
    """The checkpoint to resume from, or None. Warns of damaged ones and skips them."""
    newest, damaged = checkpoints.newest(scratch)
    for folder in damaged:
        job.warning(
            f"{folder.name} is damaged: its files are not those that were saved",
            f"Training goes on from {newest.name if newest else 'the start'}, with the same result. If nobody"
            " changed the files, the disk may be failing: see dmesg.",
        )
    return newest
