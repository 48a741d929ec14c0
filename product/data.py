"""What stage data makes of the user's rows, before there is a base: stages/data/preview.py, with the
tokenizer of the built base, or else the one that stages/base/tokenizer_files.py writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from forge import plan, preflight
from forge.executor import Executor
from forge.journal import Event
from forge.plan import Context
from forge.recipe import Recipe
from product import DATA, TRAIN, aside
from product.aside import Module

TOKENIZER, MODULE = "tokenizer_files", "preview"
REJECTS = "rejects.jsonl"


def preview(
    context: Context,
    executor: Executor,
    places: Sequence[str],
    first: int,
    listener: Callable[[Event], None],
    wait: bool = True,
) -> dict[str, Any] | None:
    """As docs/formats.md has it (What `build.py data` prints), with the rows at `places` (FILE:LINE) and the
    `first` ones. None if it failed, which `listener` was told.

    Refused, before anything runs, if this machine cannot run it.
    """
    recipe = context.recipe
    modules = _modules(context, places, first)
    steps = [module.step for module in modules]
    lacking = aside.lacking(context, executor, MODULE, steps)
    aside.refuse(lacking + preflight.secret_findings(recipe, steps))
    again = f"python build.py data --recipe {recipe.option}"
    if (ran := aside.run(context, executor, modules, again, listener, wait)) is None:
        return None
    report, task = ran
    rejects = task.folder / REJECTS
    kept = str(rejects) if rejects.exists() else None
    return {**report, "steps": _steps(recipe, report["counts"]), "rejects": kept}


def _modules(context: Context, places: Sequence[str], first: int) -> list[Module]:
    """The look at the rows, and before it what writes a tokenizer, if the base is not built."""
    recipe = context.recipe
    step = aside.step_of(context, DATA, "a recipe that reads conversations")
    look = Module(
        step,
        MODULE,
        "rows as stage data reads them",
        seconds=60 * step.needs.minutes,
        given={"rows": list(places), "first": first},
        keeps=REJECTS,
    )
    base = plan.planned_stage(context, step.inputs["base"])
    if base.state == "cached":
        return [look]
    return [Module(recipe.stages[base.name], TOKENIZER, "the base is not built", seconds=15.0), look]


def _steps(recipe: Recipe, counts: dict[str, Any] | None) -> dict[str, Any] | None:
    """How many steps of `batch` rows an epoch is, and how many `steps` and `epochs` the recipe trains; None
    where that is not known before the training.
    """
    train = recipe.stages.get(TRAIN)
    if not counts or not train or train.params.get("batch_tokens") or not train.params.get("batch"):
        return None
    rows, batch = counts["train"], train.params["batch"]
    epochs = train.params["epochs"] or train.params["steps"] * batch / rows
    steps = -(-max(1, round(epochs * rows)) // batch) if train.params["epochs"] else train.params["steps"]
    return {"batch": batch, "epoch": -(-rows // batch), "steps": steps, "epochs": round(epochs, 2)}
