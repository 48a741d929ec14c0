"""What a run leaves behind: the adapter, its losses and figures, the picture, and the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model import adapter, assemble
from model.layers import tuning
from model.weights import origin
from stages import job
from stages.job import Job, StageError
from stages.train import limits, picture, sizes, verdict
from stages.train.loop import History
from stages.train.pack import Order, trained_tokens, unfilled_share
from stages.train.parameters import Parameters
from stages.train.verdict import Verdict
from stages.train.watch import Watch

if TYPE_CHECKING:
    from model.layers.structure import Model


def write_artifact(
    task: Job,
    model: Model,
    history: History,
    rows: list[dict[str, Any]],
    order: Order,
    watch: Watch,
    seconds: float,
) -> None:
    """Writes the artifact from the trained model and the measurements, and tells the verdict (`judge`)."""
    params = task.parameters(Parameters)
    base = origin.read(task.inputs["base"])
    adapter.save(model, task.output / "adapter", params.targets, params.rank, params.alpha, base)
    write_losses(history, task.output / "loss.jsonl")
    steps = max(history.train, default=0)
    kept = history.best[1] if history.best else steps
    first = limits.first_rounded(params, params.steps)
    rounded_from = first if max(history.held_out, default=0) > first else 0
    result = verdict.of_curves(history.train, history.held_out, kept, rounded_from)
    losses, trained = summary(history, kept), sizes.step_sizes(order, steps)
    epochs = trained["epochs"] or 0.0
    picture.draw(history.train, history.held_out, kept, epochs, result.sentence, task.output / "loss.png")
    report = {
        "method": params.method,
        "targets": params.targets,
        "rank": params.rank,
        "alpha": params.alpha,
        "steps": steps,
        "stopped_early": history.stopped is not None,
        "kept_step": kept,
        "verdict": result.as_json(),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": assemble.parameters(model),
        "groups": assemble.bytes_by_group(model),
        "conversations": len(rows),
        "trained_tokens": trained_tokens(rows),
        **trained,
        "unfilled": unfilled_share(order, params.sequence_tokens, steps),
        "loss": losses,
        "deterministic": task.device == "cpu" or params.deterministic,
        "tokens_per_second": round(watch.speed),
        "peak_bytes": watch.memory(),
        "seconds": round(seconds, 1),
    }
    if kernels := tuning.for_manifest():  # recorded because kernels differ in their order of summing
        report["kernels"] = kernels
    (task.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    judge(params, result, losses)


def write_losses(history: History, path: Path) -> None:
    """Writes a line for each step. Step 0 is the base, which has only a held-out loss."""
    with path.open("w") as opened:
        for step in sorted({*history.train, *history.held_out}):
            line = {
                "step": step,
                "train": history.train.get(step),
                "held_out": history.held_out.get(step),
                "norm": history.norm.get(step),
                "learning_rate": history.rate.get(step),
            }
            opened.write(json.dumps({key: value for key, value in line.items() if value is not None}) + "\n")


def summary(history: History, kept: int) -> dict[str, float | None]:
    """`loss` of training.json, in nats for each trained token; None for what was not measured.

    `first` is the training loss of step 1, before anything was learnt. `last` and `best` are means of ten
    steps, and `drop` is the share by which `last` is below `first`.
    """
    first, last, best = _means(list(history.train.values())) if history.train else (None, None, None)
    held_out = history.held_out
    return {
        "first": first,
        "last": last,
        "best": best,
        "drop": 1 - last / first if first and last is not None else None,
        "held_out": held_out.get(kept),
        "held_out_base": held_out.get(0),
        "held_out_last": held_out[max(held_out)] if held_out else None,
    }


def _means(losses: list[float]) -> tuple[float, float, float]:
    windows = [
        sum(losses[start : start + 10]) / len(losses[start : start + 10])
        for start in range(max(1, len(losses) - 9))
    ]
    return losses[0], windows[-1], min(windows)


def judge(params: Parameters, result: Verdict, losses: dict[str, float | None]) -> None:
    """Tells the user the verdict. Warns if the training loss fell by less than `min_loss_drop`; with
    `require_loss_drop` that is a StageError.
    """
    drop = losses["drop"]
    if drop is None:
        return
    job.metric("loss drop", drop)
    if result.name in ("learnt", "no_held_out"):  # the latter was warned of before training
        job.progress(0, None, "", result.sentence)
    else:
        job.warning(result.sentence, result.advice)
    if drop >= params.min_loss_drop:
        return
    found = f"the training loss fell by {drop:.0%}, from {losses['first']:.3f} to {losses['last']:.3f}"
    expected = f"at least {params.min_loss_drop:.0%} (min_loss_drop)"
    remedy = "Lower min_loss_drop, or train for more steps or with a higher rank or learning_rate"
    if params.require_loss_drop:
        raise StageError(found, expected, remedy)
    job.warning(f"{found}; wanted {expected}", remedy)
