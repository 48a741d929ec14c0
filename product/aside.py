"""Running modules of stages' folders beside the line: they use what is built and make no artifact.

stages/train/warm.py compiles kernels so, stages/evaluate/ask.py asks the built models, and
stages/data/preview.py looks at rows before there is a base.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forge import lock, modes, plan, preflight, secret, store
from forge.executor import Executor, Task
from forge.finding import Finding, Refused, error
from forge.follow import StageFailed, follow
from forge.journal import Event, Journal
from forge.mask import Mask
from forge.plan import Context
from forge.recipe import Step

GIVEN = "given.json"  # in the module's scratch folder


@dataclass(frozen=True)
class Module:
    """`name` is the file in the stage's folder. `why`, `seconds` and `disk_gb` are what is shown of it before
    it runs. It finds `given` as JSON in its scratch folder, and of its output the file `keeps` stays in the
    run's folder.
    """

    step: Step
    name: str
    why: str
    seconds: float
    disk_gb: float = 0.0
    given: Any = None
    keeps: str = ""


def step_of(context: Context, name: str, expected: str) -> Step:
    """The stage whose module is to run. Refused if the recipe has no such stage."""
    if name not in context.recipe.stages:
        found = f"no stage {name} in recipe {context.recipe.name}"
        raise Refused(error(name, found, expected, "Name another recipe with --recipe."))
    return context.recipe.stages[name]


def lacking(context: Context, executor: Executor, name: str, steps: Sequence[Step]) -> list[Finding]:
    """What this machine lacks for the module `name` and those before it, of the stages `steps`."""
    recipe = context.recipe
    images = dict.fromkeys(step.contract.image for step in steps)
    gpu = any(recipe.on_gpu(step.name) for step in steps)
    findings = executor.check([recipe.images[image] for image in images], gpu=gpu)
    needed = max(step.needs.memory_gb for step in steps)
    crowded = preflight.memory_finding(name, needed, context.store.home, executor.neighbours())
    return [*findings, *([crowded] if crowded else [])]


def refuse(findings: Iterable[Finding]) -> None:
    """Refused with those that are errors, if any is."""
    if errors := [finding for finding in findings if finding.level == "error"]:
        raise Refused(errors)


def run(
    context: Context,
    executor: Executor,
    modules: Sequence[Module],
    again: str,
    listener: Callable[[Event], None],
    wait: bool = True,
) -> tuple[dict[str, Any], Task] | None:
    """What the last module wrote as `<name>.json`, and its task; None if one failed, which `listener` was
    told. `again` is the command that runs them once more.

    A module gets what its stage would: parameters, sources, secrets, and its inputs as far as they are built.
    Where a module before it belongs to the stage that makes an input, the input is what that module wrote.
    Nothing is kept but logs and what a module `keeps`.
    """
    with lock.held(
        context.store.root / "lock",
        wait,
        lambda who: listener({"event": "waiting", "holder": lock.describe(who)}),
    ):
        context.store.clean()
        with secret.with_files(context.recipe, context.store.tmp) as recipe:
            # A name of its own: `status` and `logs` tell of the recipe's runs, which this is none of.
            journal = Journal(
                context.store.home,
                f"{recipe.name}.{modules[-1].name}",
                Mask.of_files(recipe.secrets.values()),
                listener,
            )
            try:
                return _ran(replace(context, recipe=recipe), executor, modules, again, journal)
            finally:
                journal.close()


def _ran(
    context: Context, executor: Executor, modules: Sequence[Module], again: str, journal: Journal
) -> tuple[dict[str, Any], Task] | None:
    began = time.monotonic()
    stages = [_as_planned(module) for module in modules]
    planned = {"recipe": context.recipe.name, "executor": executor.name, "stages": stages}
    journal.plan(planned)
    journal.emit("plan", **planned, folder=str(journal.folder))
    made: dict[str, Path] = {}  # stage -> the output folder of its module
    with contextlib.ExitStack() as folders:
        for number, module in enumerate(modules, 1):
            output, scratch = folders.enter_context(_folders(context, module))
            prefix = f"{number:02d}-{module.name}"
            task = Task(
                stage=module.name,
                program=plan.program(context, module.step, module.name),
                job=_job(context, module, made, output, scratch),
                folder=journal.folder,
                prefix=prefix,
                gpu=context.recipe.on_gpu(module.step.name),
                network=module.step.needs.network,
                memory_gb=module.step.needs.memory_gb,
                pids=module.step.needs.pids,
            )
            if not _succeeds(context, executor, journal, module, task, again):
                return None
            made[module.step.name] = output
            if module.keeps and (output / module.keeps).exists():
                modes.write(journal.folder / module.keeps, (output / module.keeps).read_text())
        report = json.loads((output / f"{module.name}.json").read_text())
    names = [module.name for module in modules]
    journal.emit("done", ran=names, seconds=round(time.monotonic() - began, 1))
    return report, task


def _as_planned(module: Module) -> dict[str, Any]:
    return {
        "stage": module.name,
        "state": "run",
        "why": module.why,
        "key": None,
        "seconds": module.seconds,
        "disk_gb": module.disk_gb,
        "memory_gb": module.step.needs.memory_gb,
        "measured": False,
    }


@contextlib.contextmanager
def _folders(context: Context, module: Module) -> Iterator[tuple[Path, Path]]:
    """An output and a scratch folder for a module, which are removed at the end."""
    output, scratch = context.store.begin(module.name, module.name)
    try:
        (scratch / GIVEN).write_text(json.dumps(module.given))
        yield output, scratch
    finally:
        store.remove(output)
        store.remove(scratch)


def _succeeds(
    context: Context, executor: Executor, journal: Journal, module: Module, task: Task, again: str
) -> bool:
    began, image = time.monotonic(), context.recipe.images[module.step.contract.image]
    log = journal.log(task.prefix)
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
        journal.emit("interrupted", stage=module.name, resume=again)
        return False
    finally:
        log.close()
    seconds = round(time.monotonic() - began, 1)
    journal.emit("stage_done", stage=module.name, seconds=seconds, bytes=0)
    return True


def _job(
    context: Context, module: Module, made: dict[str, Path], output: Path, scratch: Path
) -> dict[str, Any]:
    recipe, step = context.recipe, module.step
    secrets = step.contract.secrets if step.needs.network else ()
    earlier = context.store.newest(step.name, recipe.name, context.executor)
    previous = {"previous": str(earlier.folder)} if step.contract.previous and earlier else {}
    return {
        "stage": module.name,
        "params": step.params,
        "inputs": {
            name: str(folder)
            for name, supplier in step.inputs.items()
            if (folder := made.get(supplier) or _built(context, supplier))
        },
        "sources": {name: [str(path.absolute()) for path in paths] for name, paths in step.sources.items()},
        "secrets": {name: str(path) for name, path in recipe.secrets.items() if name in secrets},
        "output": str(output),
        "scratch": str(scratch),
        **previous,
        "seed": recipe.seed,
        "device": recipe.device(step.name),
        "provenance": {},
    }


def _built(context: Context, name: str) -> Path | None:
    """The folder of a stage's artifact, if it is built."""
    stage = plan.planned_stage(context, name)
    return stage.artifact.folder if stage.artifact and stage.state == "cached" else None
