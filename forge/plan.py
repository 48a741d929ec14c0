"""What would run, and why: decided from the recipe and the store alone, before anything is done."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forge import earlier, key
from forge.finding import Refused, error
from forge.program import Program
from forge.recipe import Recipe, Step, nearest_stage
from forge.store import Artifact, Store

GB = 1e9


@dataclass(frozen=True)
class Context:
    """What a plan depends on. `executor` is a name; `gpu` an architecture such as sm_121, or "none"."""

    recipe: Recipe
    store: Store
    repo: Path
    executor: str
    gpu: str = "none"


@dataclass(frozen=True)
class Selection:
    """`only` these stages, or those that depend on `first` and that `last` depends on; `force` runs what
    is cached too.
    """

    first: str | None = None
    last: str | None = None
    only: tuple[str, ...] = ()
    force: bool = False

    def stages(self, recipe: Recipe) -> list[str]:
        for name in (*self.only, *filter(None, (self.first, self.last))):
            if name not in recipe.stages:
                raise Refused(
                    error(
                        "stage",
                        f"no stage {name} in recipe {recipe.name}",
                        "one of its stages",
                        nearest_stage(name, recipe.stages),
                    )
                )
        names = [n for n in recipe.stages if not self.only or n in self.only]
        if self.last:
            names = [n for n in names if n in recipe.upstream(self.last)]
        if self.first:
            names = [n for n in names if self.first in recipe.upstream(n)]
        if not names:
            raise Refused(
                error(
                    "selection",
                    f"no stage in {self.words()}",
                    "at least one stage",
                    f"The stages in their order: {', '.join(recipe.stages)}.",
                )
            )
        return names

    def words(self) -> str:
        """The options that chose these stages."""
        options = [
            *(("--from", self.first),) * bool(self.first),
            *(("--until", self.last),) * bool(self.last),
            *(("--only", name) for name in self.only),
        ]
        return " ".join(f"{option} {name}" for option, name in options)


@dataclass(frozen=True)
class Estimate:
    """What a run takes; `measured` if it comes from an earlier run and not from the contract."""

    seconds: float
    disk_gb: float
    memory_gb: float
    measured: bool


@dataclass(frozen=True)
class Stage:
    """One stage of a plan. `waits`: an input is not built yet, so whether it runs is open. `blocked`: it
    cannot run, since an input is neither built nor selected. `unread`: files of a cached artifact that are
    read again before a stage uses them, since they may have changed."""

    name: str
    state: Literal["cached", "run", "waits", "blocked"]
    why: str
    key: key.Key
    artifact: Artifact | None
    estimate: Estimate
    unread: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "stage": self.name,
            "state": self.state,
            "why": self.why,
            "unread": len(self.unread),
            "key": self.key.sha256,
            "seconds": round(self.estimate.seconds, 1),
            "disk_gb": round(self.estimate.disk_gb, 3),
            "memory_gb": self.estimate.memory_gb,
            "measured": self.estimate.measured,
        }


@dataclass(frozen=True)
class Plan:
    recipe: str
    executor: str
    stages: tuple[Stage, ...]
    left_out: int = 0  # stages of the recipe that were not selected

    @property
    def pending(self) -> list[Stage]:
        """The stages that run, or may."""
        return [s for s in self.stages if s.state in ("run", "waits")]

    @property
    def seconds(self) -> float:
        return sum(s.estimate.seconds for s in self.pending)

    @property
    def disk_gb(self) -> float:
        return sum(s.estimate.disk_gb for s in self.pending)

    @property
    def memory_gb(self) -> float:
        return max((s.estimate.memory_gb for s in self.pending), default=0.0)

    def as_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "executor": self.executor,
            "stages": [s.as_json() for s in self.stages],
            "seconds": round(self.seconds, 1),
            "disk_gb": round(self.disk_gb, 3),
            "memory_gb": self.memory_gb,
        }


def make(context: Context, selection: Selection = Selection()) -> Plan:
    """The plan for the selected stages, in the order in which they run. Changes nothing."""
    names = selection.stages(context.recipe)
    built: dict[str, Artifact] = {}
    stages = []
    for step in context.recipe.stages.values():
        stage = examine(context, step, built, selection, step.name in names, set(names))
        if stage.artifact and stage.state == "cached":
            built[step.name] = stage.artifact
        if step.name in names:
            stages.append(stage)
    left_out = len(context.recipe.stages) - len(stages)
    return Plan(context.recipe.name, context.executor, tuple(stages), left_out)


def examine(
    context: Context,
    step: Step,
    built: Mapping[str, Artifact],
    selection: Selection,
    selected: bool = True,
    names: set[str] | None = None,
) -> Stage:
    """One stage, given the artifacts that stand (`built`) and the names that are selected (None: all)."""

    def digest(supplier: str) -> str | None:
        return built[supplier].digest if supplier in built else None

    stage_key = key.of_step(
        step, context.recipe, context.repo, context.executor, context.store.memo, context.gpu, digest
    )
    newest = context.store.newest(step.name, context.recipe.name, context.executor)
    artifact = context.store.find(step.name, stage_key.sha256)
    estimate = _estimate(step, newest)
    if stage_key.waits:
        missing = [n for n in stage_key.waits if names is not None and n not in names]
        if missing:
            return Stage(
                step.name,
                "blocked",
                f"{', '.join(missing)} not built and not selected",
                stage_key,
                None,
                estimate,
            )
        return Stage(step.name, "waits", f"after {', '.join(stage_key.waits)}", stage_key, None, estimate)
    if artifact and not (selection.force and selected):
        unread = tuple(context.store.unread(artifact))
        why = f"built {age(artifact.created)}" + (f"; {_again(unread)}" if unread else "")
        return Stage(step.name, "cached", why, stage_key, artifact, estimate, unread)
    return Stage(step.name, "run", _why(context, step, stage_key, artifact), stage_key, artifact, estimate)


def _why(context: Context, step: Step, stage_key: key.Key, artifact: Artifact | None) -> str:
    assert stage_key.sha256
    name = step.name
    if artifact:
        why = "forced"
    elif broken := context.store.broken(name, stage_key.sha256):
        why = f"its artifact is damaged: {broken}"
    elif (before := _earlier(context, step, stage_key)) is None:
        why = "never built"
    elif differ := earlier.changes(context.store.memo, before, step, stage_key):
        more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
        why = differ[0].phrase + more
    else:
        why = "its artifact was deleted"
    return why + (", goes on where it stopped" if context.store.unfinished(name, stage_key.sha256) else "")


def _earlier(context: Context, step: Step, stage_key: key.Key) -> Artifact | None:
    return earlier.artifact(context.store, context.recipe.name, context.executor, step, stage_key)


def _again(unread: Sequence[str]) -> str:
    more = f" and {len(unread) - 1} more files" if len(unread) > 1 else ""
    return f"{unread[0]}{more} may have changed, and will be read before use"


def recorded(context: Context) -> dict[str, Artifact]:
    """Stage -> what lies at its present key, whole or damaged. Inputs are what their manifests say, so that
    one damaged artifact hides none of those that are made from it. Refused as `Store.at` is.
    """
    recipe, lying = context.recipe, dict[str, Artifact]()
    for step in recipe.stages.values():
        stage_key = key.of_step(
            step,
            recipe,
            context.repo,
            context.executor,
            context.store.memo,
            context.gpu,
            lambda supplier: lying[supplier].digest if supplier in lying else None,
        )
        if stage_key.sha256 and (artifact := context.store.at(step.name, stage_key.sha256)):
            lying[step.name] = artifact
    return lying


def program(context: Context, step: Step, start: str = "") -> Program:
    """What runs a stage, or the module `start` of its folder."""
    return Program(step.name, context.recipe.images[step.contract.image], context.repo, start)


def _estimate(step: Step, newest: Artifact | None) -> Estimate:
    needs = step.needs
    if newest is None:
        return Estimate(needs.minutes * 60, needs.disk_gb, needs.memory_gb, False)
    return Estimate(newest.manifest["seconds"], newest.bytes / GB, needs.memory_gb, True)


def age(then: datetime.datetime) -> str:
    seconds = (datetime.datetime.now(datetime.UTC) - then).total_seconds()
    for size, word in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds / size)} {word} ago"
    return "just now"


@dataclass(frozen=True)
class Explanation:
    """A stage against an earlier artifact of it (forge/earlier.py): `old` is that artifact's key, None if
    there is none, and `run` the last run that made or used it, empty if its folder is gone.
    """

    stage: Stage
    old: str | None
    changes: tuple[key.Change, ...]
    run: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            **self.stage.as_json(),
            "old_key": self.old,
            "run": self.run,
            "changes": [change.as_json() for change in self.changes],
            "components": self.stage.key.components,
        }


def explain(context: Context, name: str) -> Explanation:
    """Why a stage runs or does not. Inputs that are not built yet are left out of the comparison."""
    stage, step = planned_stage(context, name), context.recipe.stages[name]
    if stage.state == "cached":
        return Explanation(stage, stage.key.sha256, ())
    before = _earlier(context, step, stage.key)
    if before is None:
        return Explanation(stage, None, ())
    differ = earlier.changes(context.store.memo, before, step, stage.key)
    run = earlier.last_run(context.store.home, context.recipe.name, name, {before.key})
    return Explanation(stage, before.key, tuple(differ), run[0] if run else "")


def planned_stage(context: Context, name: str) -> Stage:
    """The plan of a single stage as it stands, its inputs being what they are."""
    return next(s for s in make(context, Selection(last=name)).stages if s.name == name)


def artifact(context: Context, name: str) -> Artifact:
    """The artifact of a stage under the present recipe and code. Refused if it is not built."""
    stage = planned_stage(context, name)
    if stage.artifact is None:
        raise Refused(
            error(
                name,
                f"no artifact ({stage.why})",
                "a stage that is built",
                f"python build.py run --recipe {context.recipe.option} --executor {context.executor} --until"
                f" {name}",
            )
        )
    return stage.artifact
