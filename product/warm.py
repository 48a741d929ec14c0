"""Compiling what stage train will run on this machine's GPU before it runs: stages/train/warm.py, in the
image of that stage.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge import lock, plan, preflight, store
from forge.executor import Executor, Task
from forge.finding import Finding, Refused, error
from forge.follow import StageFailed, follow
from forge.journal import Event, Journal
from forge.mask import Mask
from forge.plan import Context
from forge.recipe import Step
from product import TRAIN

MODULE = "warm"


def warm(
    context: Context, executor: Executor, listener: Callable[[Event], None], wait: bool = True
) -> dict[str, Any] | None:
    """`compiled`, `loaded`, `tuned` (counts), `bytes` and `folder` of the kernels that are kept; None if
    it failed, which `listener` was told.

    Refused, before anything runs, where no GPU would compile them.
    """
    step = context.recipe.stages.get(TRAIN)
    if findings := lacking(context, executor, step):
        raise Refused(findings)
    assert step
    with lock.held(
        context.store.root / "lock",
        wait,
        lambda who: listener({"event": "waiting", "holder": lock.describe(who)}),
    ):
        context.store.clean()
        # A name of its own: `status` and `logs` tell of the recipe's runs, which this is none of.
        journal = Journal(
            context.store.home,
            f"{context.recipe.name}.{MODULE}",
            Mask.of_files(context.recipe.secrets.values()),
            listener,
        )
        output, scratch = context.store.begin(MODULE, MODULE)
        try:
            return _Warming(context, executor, journal, step).kernels(output, scratch)
        finally:
            store.remove(output)
            store.remove(scratch)
            journal.close()


def lacking(context: Context, executor: Executor, step: Step | None) -> list[Finding]:
    """Why nothing can be compiled here for this recipe."""
    if step is None:
        return [
            error(
                TRAIN,
                f"recipe {context.recipe.name} has no stage {TRAIN}",
                "a recipe that trains",
                "Name another recipe with --recipe.",
            )
        ]
    if not context.recipe.on_gpu(TRAIN):
        return [
            error(
                "gpu",
                f"recipe {context.recipe.name} trains without a GPU",
                "one that says gpu: cuda: only what a GPU runs is compiled",
                "Nothing needs to be warmed for this recipe; name another with --recipe.",
            )
        ]
    findings = executor.check([context.recipe.images[step.contract.image]], gpu=True)
    needed, home = step.needs.memory_gb, context.store.home
    if crowded := preflight.memory_finding(MODULE, needed, home, executor.neighbours()):
        findings.append(crowded)
    if context.gpu == "none":
        findings.append(
            error(
                "gpu",
                "no GPU that nvidia-smi can see",
                "the GPU that will train, since kernels are compiled for it",
                "Install the driver, or run this on the machine that will train.",
            )
        )
    return [finding for finding in findings if finding.level == "error"]


class _Warming:
    """One run of stages/train/warm.py."""

    def __init__(self, context: Context, executor: Executor, journal: Journal, step: Step):
        self.context, self.executor, self.journal, self.step = context, executor, journal, step

    def kernels(self, output: Path, scratch: Path) -> dict[str, Any] | None:
        recipe, began = self.context.recipe, time.monotonic()
        image = recipe.images[self.step.contract.image]
        about = {
            "stage": MODULE,
            "state": "run",
            "why": "kernels of stage train",
            "key": None,
            "seconds": 90.0,
            "disk_gb": 0.2,
            "memory_gb": self.step.needs.memory_gb,
            "measured": False,
        }
        planned = {"recipe": recipe.name, "executor": self.executor.name, "stages": [about]}
        self.journal.plan(planned)
        self.journal.emit("plan", **planned, folder=str(self.journal.folder))
        log = self.journal.log(f"01-{MODULE}")
        try:
            said = lambda line: self.journal.emit("log", image=image.name, line=log.line(line))
            self.executor.prepare(image, said)
            self.executor.bake(plan.program(self.context, self.step, MODULE), said)
            self.journal.emit("stage", stage=MODULE, why=about["why"], key=None, estimate=about["seconds"])
            task = self.task(output, scratch)
            follow(self.executor, self.journal, self.context.store.home, task, log)
        except StageFailed as failed:
            self.journal.emit("failed", stage=MODULE, **failed.as_event())
            return None
        except KeyboardInterrupt:
            self.journal.emit(
                "interrupted", stage=MODULE, resume=f"python build.py warm --recipe {recipe.option}"
            )
            return None
        finally:
            log.close()
        report = json.loads((output / f"{MODULE}.json").read_text())
        kernels = {name: report[name] for name in ("compiled", "loaded", "tuned", "bytes")} | {
            "folder": str(self.executor.kernels(task))
        }
        seconds = round(time.monotonic() - began, 1)
        self.journal.emit("stage_done", stage=MODULE, seconds=seconds, bytes=kernels["bytes"])
        self.journal.emit("done", ran=[MODULE], seconds=seconds)
        return kernels

    def task(self, output: Path, scratch: Path) -> Task:
        """stages/train/warm.py with the parameters of stage train, and those of its inputs that are built."""
        recipe, step = self.context.recipe, self.step
        built = {name: plan.planned_stage(self.context, supplier) for name, supplier in step.inputs.items()}
        inputs = {
            name: str(stage.artifact.folder)
            for name, stage in built.items()
            if stage.artifact and stage.state == "cached"
        }
        job = {
            "stage": MODULE,
            "params": step.params,
            "inputs": inputs,
            "sources": {},
            "secrets": {},
            "output": str(output),
            "scratch": str(scratch),
            "seed": recipe.seed,
            "device": recipe.device(TRAIN),
            "provenance": {},
        }
        return Task(
            stage=MODULE,
            program=plan.program(self.context, step, MODULE),
            job=job,
            folder=self.journal.folder,
            prefix=f"01-{MODULE}",
            gpu=True,
            memory_gb=step.needs.memory_gb,
            pids=step.needs.pids,
        )
