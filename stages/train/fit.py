"""One fine-tuning run: it reads a base and tokens, and writes an adapter and the loss curve.

The base is loaded into our own parts of the native class (model/assemble.py). Stage data has tokenised and
masked the rows, so training and serving use the same template. stages/train/loop.py is the loop. The router
is frozen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model import adapter, assemble
from model.families.family import FamilyError
from model.layers import determinism, kernel_watch, recompute, tuning
from model.weights import origin
from model.weights.checkpoint import Checkpoint
from model.weights.shards import Shards
from stages import dataset, job
from stages.job import Job, StageError
from stages.train import checkpoints, guard, memory, picture, ranks, sizes
from stages.train.board import Board
from stages.train.loop import History, Loop
from stages.train.pack import Order, trained_tokens, unfilled_share
from stages.train.parameters import Parameters
from stages.train.teacher import Teacher
from stages.train.watch import Watch

if TYPE_CHECKING:
    from model.layers.structure import Model


def run(task: Job) -> None:
    """Trains and writes `adapter/`, `training.json`, `loss.jsonl`, `loss.png` and `tensorboard/`."""
    began, params = time.monotonic(), task.parameters(Parameters)
    guard.check_steps(params.steps)
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
        write_artifact(task, model, history, rows, loop.order, watch, time.monotonic() - began)


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
    if params.sharded and group.world == 1:
        raise StageError(
            "sharded with one process",
            "several that hold the base between them",
            "Set ranks to the number of GPUs, or leave sharded out",
        )
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

    The teacher is recorded just before the first rounded step. Raises StageError if the base is not held in
    BF16, because the export rounds BF16 weights. Raises it too if there is a teacher but no rounded step or
    no rounded weight.
    """
    params = task.parameters(Parameters)
    first = params.steps - round(params.qat_share * params.steps)
    if params.qat_share and params.method != "lora":
        raise StageError(
            f"qat_share with method {params.method}",
            "method lora",
            "The export rounds BF16 weights: hold the base in BF16, or leave qat_share 0",
        )
    exported = assemble.exported(model)
    if teacher and not (params.qat_share and exported):
        raise StageError(
            "qat_loss teacher with nothing to learn from it",
            "a qat_share above 0, and targets that the export quantises",
            "Set qat_share (0.3, say) and targets experts or all, or leave qat_loss at labels",
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


def write_artifact(
    task: Job,
    model: Model,
    history: History,
    rows: list[dict[str, Any]],
    order: Order,
    watch: Watch,
    seconds: float,
) -> None:
    """Writes the artifact from the trained model and the measurements. Warns, or raises StageError, if the
    loss fell too little.
    """
    params = task.parameters(Parameters)
    base = origin.read(task.inputs["base"])
    adapter.save(model, task.output / "adapter", params.targets, params.rank, params.alpha, base)
    with (task.output / "loss.jsonl").open("w") as opened:
        # A run of no steps has only a held-out loss, at step 0.
        for step in sorted({*history.train, *history.held_out}):
            line = {
                "step": step,
                "train": history.train.get(step),
                "held_out": history.held_out.get(step),
                "norm": history.norm.get(step),
                "learning_rate": history.rate.get(step),
            }
            opened.write(json.dumps({key: value for key, value in line.items() if value is not None}) + "\n")
    steps = max(history.train, default=0)
    drop: float | None = None
    first, last, best = None, None, None
    if steps:
        first, last, best = loss_summary(list(history.train.values()))
        drop = 1 - last / first
    picture.draw(history.train, history.held_out, drop, task.output / "loss.png")
    report = {
        "method": params.method,
        "targets": params.targets,
        "rank": params.rank,
        "alpha": params.alpha,
        "steps": steps,
        "stopped_early": history.stopped is not None,
        "kept_step": history.best[1] if history.best else steps,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": assemble.parameters(model),
        "groups": assemble.bytes_by_group(model),
        "conversations": len(rows),
        "trained_tokens": trained_tokens(rows),
        **sizes.step_sizes(order, steps),
        "unfilled": unfilled_share(order, params.sequence_tokens, steps),
        "loss": {
            "first": first,
            "last": last,
            "best": best,
            "drop": drop,
            "held_out": history.held_out[max(history.held_out)] if history.held_out else None,
        },
        "deterministic": task.device == "cpu" or params.deterministic,
        "tokens_per_second": round(watch.speed),
        "peak_bytes": watch.memory(),
        "seconds": round(seconds, 1),
    }
    if kernels := tuning.for_manifest():  # recorded because kernels differ in their order of summing
        report["kernels"] = kernels
    (task.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    if drop is None:
        return
    job.metric("loss drop", drop)
    if drop < params.min_loss_drop:
        found = f"the loss fell by {drop:.0%}, from {first:.3f} to {last:.3f}"
        expected = f"at least {params.min_loss_drop:.0%}"
        if params.require_loss_drop:
            raise StageError(
                found, expected, "Train for more steps, raise rank or learning_rate, or choose targets: all"
            )
        job.warning(
            f"{found}; wanted {expected}",
            "Train for more steps, raise rank or learning_rate, or choose targets: all",
        )


def loss_summary(losses: list[float]) -> tuple[float, float, float]:
    """First, last and best loss. The first is that of step 1, before anything was learnt. The others are
    means of ten steps.
    """
    windows = [
        sum(losses[start : start + 10]) / len(losses[start : start + 10])
        for start in range(max(1, len(losses) - 9))
    ]
    return losses[0], windows[-1], min(windows)
