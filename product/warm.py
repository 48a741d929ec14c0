"""Compiling what stage train will run on this machine's GPU before it runs: stages/train/warm.py, in the
image of that stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forge.executor import Executor
from forge.finding import Finding, error
from forge.journal import Event
from forge.plan import Context
from forge.recipe import Step
from product import TRAIN, aside
from product.aside import Module

MODULE = "warm"


def warm(
    context: Context, executor: Executor, listener: Callable[[Event], None], wait: bool = True
) -> dict[str, Any] | None:
    """`compiled`, `loaded`, `tuned` (counts), `bytes` and `folder` of the kernels that are kept; None if
    it failed, which `listener` was told.

    Refused, before anything runs, where no GPU would compile them.
    """
    recipe, step = context.recipe, aside.step_of(context, TRAIN, "a recipe that trains")
    aside.refuse(lacking(context, executor, step))
    again = f"python build.py warm --recipe {recipe.option}"
    module = Module(step, MODULE, f"kernels of stage {TRAIN}", seconds=90.0, disk_gb=0.2)
    if (ran := aside.run(context, executor, [module], again, listener, wait)) is None:
        return None
    report, task = ran
    kernels = {name: report[name] for name in ("compiled", "loaded", "tuned", "bytes")}
    return kernels | {"folder": str(executor.kernels(task))}


def lacking(context: Context, executor: Executor, step: Step) -> list[Finding]:
    """Why nothing can be compiled here for this recipe."""
    if not context.recipe.on_gpu(TRAIN):
        return [
            error(
                "gpu",
                f"recipe {context.recipe.name}, which trains without a GPU",
                "one that says gpu: cuda: only what a GPU runs is compiled",
                "Nothing needs to be warmed for this recipe; name another with --recipe.",
            )
        ]
    findings = aside.lacking(context, executor, MODULE, [step])
    if context.gpu == "none":
        findings.append(
            error(
                "gpu",
                "no GPU that nvidia-smi can see",
                "the GPU that will train, since kernels are compiled for it",
                "Install the driver, or run this on the machine that will train.",
            )
        )
    return findings
