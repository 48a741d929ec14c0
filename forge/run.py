"""Doing a plan: stage by stage, each one taken only when it is whole."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from forge import (
    check,
    last_run,
    lock,
    plan,
    preflight,
    same_name,
    secret,
    sources,
    store,
    terminal,
    trouble,
    verify,
)
from forge.executor import Executor, ProductBuilder, Task
from forge.finding import Finding, Refused, error
from forge.follow import StageFailed, follow
from forge.journal import Event, Journal, Log
from forge.mask import Mask
from forge.plan import Context, Plan, Selection, Stage
from forge.recipe import Step
from forge.store import Artifact


@dataclass(frozen=True)
class Outcome:
    """`code` is the exit status: 0 all selected stages stand, 1 one failed, 130 interrupted."""

    code: int
    ran: tuple[str, ...]
    folder: Path | None


def run(
    context: Context,
    executor: Executor,
    selection: Selection,
    listener: Callable[[Event], None],
    wait: bool = True,
) -> Outcome:
    """Runs what is not cached. Refused, before anything runs, with whatever this machine lacks for it."""
    planned = plan.make(context, selection)
    _refuse_blocked(planned)
    if not planned.pending:
        for finding in same_name.findings(context):
            listener({"event": "finding", **finding.__dict__})
        _note_run(context)
        listener({"event": "plan", **planned.as_json()})
        listener({"event": "done", "ran": [], "seconds": 0.0})
        return Outcome(0, (), None)
    with lock.held(
        context.store.root / "lock",
        wait,
        lambda who: listener({"event": "waiting", "holder": lock.describe(who)}),
    ):
        context.store.clean()
        executor.end_orphans()
        planned = plan.make(context, selection)  # another run may have built some of it while this one waited
        _refuse_lacking(context, executor, planned, listener)
        _note_run(context)
        with secret.with_files(context.recipe, context.store.tmp) as recipe:
            context = replace(context, recipe=recipe)
            mask = Mask.of_files(recipe.secrets.values())
            journal = Journal(context.store.home, recipe.name, mask, listener)
            try:
                with _interruptible(), terminal.told_of_closing(journal.unattended):
                    return _Run(context, executor, selection, journal).outcome_of(planned)
            finally:
                journal.close()


def _note_run(context: Context) -> None:
    last_run.write(context.store.home, context.repo, context.recipe.file, context.executor)


def _refuse_blocked(planned: Plan) -> None:
    blocked = [s for s in planned.stages if s.state == "blocked"]
    if blocked:
        raise Refused(
            error(s.name, s.why, "its inputs built", "Leave --only and --from out, or build those first.")
            for s in blocked
        )


def _refuse_lacking(
    context: Context, executor: Executor, planned: Plan, listener: Callable[[Event], None]
) -> None:
    findings = lacking(context, executor, planned)
    for finding in findings:
        if finding.level != "error":
            listener({"event": "finding", **finding.__dict__})
    if errors := [f for f in findings if f.level == "error"]:
        raise Refused(errors)


def lacking(context: Context, executor: Executor, planned: Plan) -> list[Finding]:
    """Every finding about this machine that matters to `wanted`."""
    recipe = context.recipe
    contracts = [recipe.stages[s.name].contract for s in planned.pending]
    names = dict.fromkeys([c.image for c in contracts] + [c.product.image for c in contracts if c.product])
    gpu = any(recipe.on_gpu(s.name) for s in planned.pending)
    gpu_here = None if context.gpu == "none" else context.gpu
    findings = preflight.findings(recipe, planned, context.store.home, gpu_here, executor.neighbours())
    findings += executor.check([recipe.images[name] for name in names], gpu)
    findings += same_name.findings(context)
    return findings + [finding for finding in check.findings(context, planned) if finding.level != "note"]


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM stops a run as Ctrl-C does: the stage is cancelled and the run says how to go on."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Run:
    """One run: the artifacts that stand so far, and the stage that is under way."""

    def __init__(self, context: Context, executor: Executor, selection: Selection, journal: Journal):
        self.context, self.executor, self.selection, self.journal = context, executor, selection, journal
        self.store, self.recipe = context.store, context.recipe
        self.numbers = {name: number for number, name in enumerate(context.recipe.stages, 1)}
        self.built: dict[str, Artifact] = {}
        self.ran: list[str] = []
        self.current = ""  # the stage that is looked at
        self.damaged: dict[str, str] = {}  # stages to be run again, with what is wrong with their artifacts

    def outcome_of(self, planned: Plan) -> Outcome:
        started = time.monotonic()
        told = {"resume": self.resume(), "recipe_file": str(self.recipe.file)}
        self.journal.plan({**told, **planned.as_json()})
        self.journal.recipe(self.recipe.text)
        self.journal.emit("plan", **planned.as_json(), folder=str(self.journal.folder))
        try:
            self.prepare([self.recipe.stages[stage.name] for stage in planned.pending])
            while not self.passed({stage.name for stage in planned.stages}):
                pass
        except KeyboardInterrupt:
            self.journal.emit("interrupted", stage=self.current, resume=self.resume())
            return self.outcome(130)
        except StageFailed as failed:
            self.journal.emit("failed", stage=self.current, **failed.as_event())
            return self.outcome(1)
        except OSError as fault:
            finding = trouble.of_fault(self.store.home, fault)
            self.journal.emit("failed", stage=self.current, **finding.as_values(), log="", tail=[])
            return self.outcome(1)
        self.journal.emit("done", ran=self.ran, seconds=round(time.monotonic() - started, 1))
        return self.outcome(0)

    def outcome(self, code: int) -> Outcome:
        return Outcome(code, tuple(self.ran), self.journal.folder)

    def command(self) -> str:
        return f"python build.py run --recipe {self.recipe.option} --executor {self.executor.name}"

    def resume(self) -> str:
        """The command that goes on with this run."""
        return f"{self.command()} {self.selection.words()}".rstrip()

    def passed(self, selected: set[str]) -> bool:
        """Runs each selected stage that is not cached. False if an input turned out to be damaged: then all
        is looked at again, the stage that made it runs again, and so do those whose keys that changes.
        """
        self.built.clear()
        for step in self.recipe.stages.values():
            self.current = step.name
            forced = step.name in selected and step.name not in self.ran
            stage = plan.examine(self.context, step, self.built, self.selection, forced)
            if stage.state == "cached" and step.name in self.damaged and step.name not in self.ran:
                why = f"its artifact is damaged: {self.damaged[step.name]}"
                stage = replace(stage, state="run", why=why)
            if stage.state == "cached":
                assert stage.artifact
                self.built[step.name] = stage.artifact
                if step.name in selected and step.name not in self.ran:
                    self.journal.emit("cached", stage=step.name, why=stage.why, key=stage.key.sha256)
            elif step.name in selected:
                if stage.key.waits:  # an input that was there when the run began
                    remedy = f"Run again: {self.resume()}"
                    raise StageFailed(error(step.name, stage.why, "inputs that stay", remedy), None, [])
                if not self.inputs_are_whole(step, selected):
                    return False
                self.built[step.name] = self.artifact(stage)
                self.ran.append(step.name)
        return True

    # --- what a stage is given ------------------------------------------------------------------------------

    def inputs_are_whole(self, step: Step, selected: set[str]) -> bool:
        """Reads what a stage is about to use, as far as it may have changed since it was last read. Before
        an image is built that is everything: a decayed bit leaves a file's times as they were.
        """
        for supplier in dict.fromkeys(step.inputs.values()):
            artifact = self.built[supplier]
            names = self.store.readable(artifact) if step.contract.product else self.store.unread(artifact)
            if damages := self.read(artifact, names):
                self.make_again(supplier, damages, selected)
                return False
        return True

    def read(self, artifact: Artifact, names: list[str]) -> list[str]:
        """What is wrong with an input, some of whose files are read for that."""
        if not names:
            return list(self.store.damages(artifact))
        stage, began = artifact.stage, time.monotonic()
        total = sum(artifact.manifest["files"][name]["size"] for name in names)
        self.journal.emit("reading", stage=stage, files=len(names), bytes=total)

        def say(done: int) -> None:
            values = {"done": done, "total": total, "unit": "bytes"}
            self.journal.emit("progress", stage=stage, **values, note="reading it before use")

        damages = verify.read(self.store, artifact, names, verify.summed(say))
        self.journal.emit(
            "read",
            stage=stage,
            state="done" if stage in self.ran else "cached",
            bytes=total,
            seconds=round(time.monotonic() - began, 1),
            damages=damages,
        )
        return damages

    def make_again(self, supplier: str, damages: list[str], selected: set[str]) -> None:
        """Has the next pass make a damaged input again. StageFailed if it is not selected, or if that did not
        help.
        """
        if supplier in self.damaged or supplier not in selected:
            remedy = (
                "It was made again in this run and has changed since: check this machine's disk and memory."
                if supplier in self.damaged
                else f"Make it again: {self.command()} --until {supplier}"
            )
            finding = error(supplier, "; ".join(damages), "the artifact as it was accepted", remedy)
            raise StageFailed(finding, None, [])
        self.damaged[supplier] = damages[0]
        if supplier in self.ran:
            self.ran.remove(supplier)
        self.prepare(
            [step for name, step in self.recipe.stages.items() if supplier in self.recipe.upstream(name)]
        )

    def prepare(self, steps: list[Step]) -> None:
        """Makes every environment and every stage's image that may be used, so that a broken one is found
        before hours of training.
        """
        for name in dict.fromkeys(step.contract.image for step in steps):
            self.image(name, f"00-{name}", partial(self.executor.prepare, self.recipe.images[name]))
        for step in steps:
            program = plan.program(self.context, step)
            self.image(f"of {step.name}", f"00-image-of-{step.name}", partial(self.executor.bake, program))

    def image(self, image: str, log_name: str, make: Callable[[Callable[[str], None]], None]) -> None:
        """Makes one image; one that is there already has nothing to say, and is not mentioned."""
        log = self.journal.log(log_name)
        started = time.monotonic()
        lines = 0

        def on_line(line: str) -> None:
            nonlocal lines
            lines += 1
            if lines == 1:
                self.journal.emit("image", image=image, state="preparing")
            self.journal.emit("log", image=image, line=log.line(line))

        try:
            make(on_line)
        except Refused as refused:
            raise StageFailed.of_findings(refused.findings, log) from refused
        finally:
            log.close()
        if lines:
            seconds = round(time.monotonic() - started, 1)
            self.journal.emit("image", image=image, state="ready", seconds=seconds)

    # --- one stage ------------------------------------------------------------------------------------------

    def artifact(self, stage: Stage) -> Artifact:
        """Runs a stage to an accepted artifact; StageFailed if it has none to give."""
        key = stage.key.sha256
        assert key
        step = self.recipe.stages[stage.name]
        if taken := preflight.memory_taken(step.name, step.needs.memory_gb, self.store.home, self.executor):
            raise StageFailed(taken, None, [])
        number = self.numbers[stage.name]
        prefix = f"{number:02d}-{stage.name}"
        self.journal.emit(
            "stage", stage=stage.name, why=stage.why, key=key, estimate=round(stage.estimate.seconds, 1)
        )
        output, scratch = self.store.begin(stage.name, key)
        log = self.journal.log(prefix)
        started = time.monotonic()
        try:
            job = self.job(stage, output, scratch)
            files = {name: sources.described(self.store.memo, p) for name, p in step.sources.items()}
            task = Task(
                stage=stage.name,
                program=plan.program(self.context, step),
                job=job,
                folder=self.journal.folder,
                prefix=prefix,
                gpu=self.recipe.on_gpu(stage.name),
                network=step.needs.network,
                memory_gb=step.needs.memory_gb,
                pids=step.needs.pids,
            )
            follow(self.executor, self.journal, self.store.home, task, log)
            if step.contract.product:
                self.build(stage, output, log)
            self.says(stage, "checking and storing what it made")
            facts = {
                "components": stage.key.components,
                "sources": files,
                "seconds": round(time.monotonic() - started, 1),
                "recipe": self.recipe.name,
                "executor": self.executor.name,
            }
            artifact = self.store.accept(
                stage.name, key, output, step.contract.produces, step.contract.files, facts
            )
        except Refused as refused:
            raise StageFailed.of_findings(refused.findings, log) from refused
        except OSError as fault:
            raise StageFailed.of_findings([trouble.of_fault(self.store.home, fault)], log) from fault
        finally:
            try:
                log.close()  # on a full disk this fails, and the output is to go all the same
            finally:
                store.remove(output)
        self.journal.emit(
            "stage_done",
            stage=stage.name,
            key=key,
            digest=artifact.digest,
            seconds=artifact.manifest["seconds"],
            bytes=artifact.bytes,
        )
        return artifact

    def says(self, stage: Stage, note: str) -> None:
        self.journal.emit("progress", stage=stage.name, done=0, total=None, unit="", note=note)

    def job(self, stage: Stage, output: Path, scratch: Path) -> dict[str, Any]:
        """The job of docs/formats.md, with the host's paths."""
        step = self.recipe.stages[stage.name]
        suppliers = {name: self.built[supplier] for name, supplier in step.inputs.items()}
        earlier = self.store.newest(stage.name, self.recipe.name, self.executor.name)
        previous = {"previous": str(earlier.folder)} if step.contract.previous and earlier else {}
        return {
            "stage": stage.name,
            "params": step.params,
            "inputs": {name: str(a.folder) for name, a in suppliers.items()},
            "sources": {name: [str(p.absolute()) for p in paths] for name, paths in step.sources.items()},
            "secrets": {n: str(p) for n, p in self.recipe.secrets.items() if n in step.contract.secrets},
            "output": str(output),
            "scratch": str(scratch),
            **previous,
            "seed": self.recipe.seed,
            "device": self.recipe.device(stage.name),
            "provenance": {
                n: {"stage": a.stage, "key": a.key, "digest": a.digest} for n, a in suppliers.items()
            },
        }

    def build(self, stage: Stage, output: Path, log: Log) -> None:
        """Makes the image of a stage with a product, with an executor that can."""
        step = self.recipe.stages[stage.name]
        product, key = step.contract.product, stage.key.sha256
        if product is None or key is None or not isinstance(self.executor, ProductBuilder):
            return
        suppliers = {name: self.built[supplier] for name, supplier in step.inputs.items()}
        labels = {"io.annie.recipe": self.recipe.name, "io.annie.key": key}
        labels |= {f"io.annie.{name}.digest": artifact.digest for name, artifact in suppliers.items()}

        repository = product.repository(step.params)
        self.says(stage, f"building the image {repository}")

        def on_line(line: str) -> None:
            self.journal.emit("log", stage=stage.name, line=log.line(line))

        self.executor.build_product(
            self.recipe.images[product.image],
            self.recipe.images[step.contract.image],
            product.folders(step.params, lambda name: suppliers[name].folder),
            output,
            f"{repository}:{key[:12]}",
            labels,
            on_line,
        )
