"""Running a module of a stage's folder beside the line: it uses what is built and makes no artifact.

stages/train/warm.py compiles kernels so, and stages/evaluate/ask.py asks the built models.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forge import lock, plan, store
from forge.executor import Executor, Task
from forge.follow import StageFailed, follow
from forge.journal import Event, Journal
from forge.mask import Mask
from forge.plan import Context
from forge.recipe import Step

GIVEN = "given.json"  # in the module's scratch folder


@dataclass(frozen=True)
class Module:
    """`name` is the file in the stage's folder. `why`, `seconds` and `disk_gb` are what is shown of it before
    it runs, `again` the command that runs it once more.
    """

    step: Step
    name: str
    why: str
    again: str
    seconds: float
    disk_gb: float = 0.0


def run(
    context: Context,
    executor: Executor,
    module: Module,
    listener: Callable[[Event], None],
    wait: bool = True,
    given: Any = None,
) -> tuple[dict[str, Any], Task] | None:
    """What the module wrote as `<name>.json`, and its task; None if it failed, which `listener` was told.

    It gets the stage's parameters, those of its inputs that are built and, in its scratch folder, `given` as
    JSON. Nothing of it is kept but its log.
    """
    with lock.held(
        context.store.root / "lock",
        wait,
        lambda who: listener({"event": "waiting", "holder": lock.describe(who)}),
    ):
        context.store.clean()
        # A name of its own: `status` and `logs` tell of the recipe's runs, which this is none of.
        journal = Journal(
            context.store.home,
            f"{context.recipe.name}.{module.name}",
            Mask.of_files(context.recipe.secrets.values()),
            listener,
        )
        output, scratch = context.store.begin(module.name, module.name)
        try:
            (scratch / GIVEN).write_text(json.dumps(given))
            task = _task(context, module, journal, str(output), str(scratch))
            if not _succeeds(context, executor, journal, module, task):
                return None
            return json.loads((output / f"{module.name}.json").read_text()), task
        finally:
            store.remove(output)
            store.remove(scratch)
            journal.close()


def _succeeds(context: Context, executor: Executor, journal: Journal, module: Module, task: Task) -> bool:
    began, image = time.monotonic(), context.recipe.images[module.step.contract.image]
    about = {
        "stage": module.name,
        "state": "run",
        "why": module.why,
        "key": None,
        "seconds": module.seconds,
        "disk_gb": module.disk_gb,
        "memory_gb": module.step.needs.memory_gb,
        "measured": False,
    }
    planned = {"recipe": context.recipe.name, "executor": executor.name, "stages": [about]}
    journal.plan(planned)
    journal.emit("plan", **planned, folder=str(journal.folder))
    log = journal.log(f"01-{module.name}")
    try:
        said = lambda line: journal.emit("log", image=image.name, line=log.line(line))
        executor.prepare(image, said)
        executor.bake(task.program, said)
        journal.emit("stage", stage=module.name, why=module.why, key=None, estimate=module.seconds)
        follow(executor, journal, context.store.home, task, log)
    except StageFailed as failed:
        journal.emit("failed", stage=module.name, **failed.as_event())
        return False
    except KeyboardInterrupt:
        journal.emit("interrupted", stage=module.name, resume=module.again)
        return False
    finally:
        log.close()
    seconds = round(time.monotonic() - began, 1)
    journal.emit("stage_done", stage=module.name, seconds=seconds, bytes=0)
    journal.emit("done", ran=[module.name], seconds=seconds)
    return True


def _task(context: Context, module: Module, journal: Journal, output: str, scratch: str) -> Task:
    recipe, step = context.recipe, module.step
    built = {name: plan.planned_stage(context, supplier) for name, supplier in step.inputs.items()}
    inputs = {
        name: str(stage.artifact.folder)
        for name, stage in built.items()
        if stage.artifact and stage.state == "cached"
    }
    return Task(
        stage=module.name,
        program=plan.program(context, step, module.name),
        job={
            "stage": module.name,
            "params": step.params,
            "inputs": inputs,
            "sources": {},
            "secrets": {},
            "output": output,
            "scratch": scratch,
            "seed": recipe.seed,
            "device": recipe.device(step.name),
            "provenance": {},
        },
        folder=journal.folder,
        prefix=f"01-{module.name}",
        gpu=recipe.on_gpu(step.name),
        memory_gb=step.needs.memory_gb,
        pids=step.needs.pids,
    )
