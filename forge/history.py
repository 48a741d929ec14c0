"""Earlier runs of a recipe: what each made and why, how it ended, and what of it is left."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forge import journal
from forge.finding import Refused, error
from forge.recipe import Recipe
from forge.store import Artifact, Store


@dataclass(frozen=True)
class PastRun:
    """A run, as its folder tells it. `name` is the folder's. `stamp` is what of it tells runs of one recipe
    apart, and what `logs --run` takes. `seconds` is None for one that did not end.
    """

    name: str
    stamp: str
    executor: str
    began: datetime.datetime
    seconds: float | None
    ending: str  # done, under way, or: failed in STAGE, stopped in STAGE, cut off in STAGE
    found: str  # what was wrong, of one that failed
    resume: str  # the command that goes on, of one that was stopped or cut off
    made: tuple[str, ...]  # stages
    why: str  # the first of them was run; empty if there is none
    keys: dict[str, str]  # stage -> key of each artifact that it made or used
    bytes: int  # of what it made and is still there
    gone: tuple[str, ...]  # stages whose artifact it made and is not there any more

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "began": self.began.isoformat(timespec="seconds")}


def of_recipe(store: Store, recipe: str) -> Iterator[PastRun]:
    """The runs of a recipe, newest first."""
    return (_read(store, folder) for folder in journal.runs(store.home, recipe))


def _read(store: Store, folder: Path) -> PastRun:
    plan, events, began = journal.plan_of(folder), journal.events(folder), journal.began(folder)
    made = {stage: str(e.get("key")) for e in events if e["event"] == "stage_done" and (stage := _stage(e))}
    begun = [(stage, str(e.get("why", ""))) for e in events if e["event"] == "stage" and (stage := _stage(e))]
    ended = next((e for e in events if e["event"] in journal.ENDINGS), None)
    ending = _ending(folder, [stage for stage, _ in begun], ended)
    resume = plan.get("resume") or (ended or {}).get("resume", "")
    artifacts = {stage: store.at(stage, key) for stage, key in made.items()}
    return PastRun(
        name=folder.name,
        stamp=journal.stamp(folder),
        executor=str(plan.get("executor", "")),
        began=began,
        seconds=_seconds(began, ended) if ended else None,
        ending=ending,
        found=str(ended.get("found", "")) if ended else "",
        resume=str(resume) if ending.startswith(("stopped", "cut off")) else "",
        made=tuple(made),
        why=begun[0][1] if begun else "",
        keys=_keys(plan, events),
        bytes=sum(artifact.bytes for artifact in artifacts.values() if artifact),
        gone=tuple(stage for stage, artifact in artifacts.items() if not artifact),
    )


def _keys(plan: dict[str, Any], events: list[journal.Event]) -> dict[str, str]:
    """Stage -> key of what a run made or used, in the order of its plan."""
    stages = plan.get("stages")
    planned = [entry for entry in (stages if isinstance(stages, list) else []) if isinstance(entry, dict)]
    keys = {str(e.get("stage")): e.get("key") if e.get("state") == "cached" else None for e in planned}
    keys |= {_stage(e): e.get("key") for e in events if e["event"] in ("cached", "stage_done")}
    return {stage: key for stage, key in keys.items() if stage and isinstance(key, str)}


def find(runs: list[PastRun], stamp: str, recipe: Recipe) -> PastRun:
    """The run of that stamp, or the one whose stamp begins with it. Refused unless there is exactly one."""
    named = [run for run in runs if run.stamp == stamp]
    named = named or [run for run in runs if stamp and run.stamp.startswith(stamp)]
    if len(named) == 1:
        return named[0]
    some = ", ".join(run.stamp for run in (named or runs)[:3]) or "none"
    raise Refused(
        error(
            "run",
            f"{len(named) or 'no'} run{'s' * (len(named) != 1)} {stamp!r} of recipe {recipe.name}",
            "the stamp of one run, or as much of it as no other has",
            f"{'These' if named else 'The last ones'}: {some}. All: python build.py runs --recipe"
            f" {recipe.option}",
        )
    )


def pair(runs: list[PastRun], then: str | None, now: str | None, recipe: Recipe) -> tuple[PastRun, PastRun]:
    """Two runs to compare, the last two unless they are named. Refused if there are not two."""
    if len(runs) < 2:
        found = f"{len(runs) or 'no'} run{'s' * (len(runs) != 1)} of recipe {recipe.name}"
        remedy = f"Change something, and run: python build.py run --recipe {recipe.option}"
        raise Refused(error("diff", found, "two to compare", remedy))
    before = find(runs, then, recipe) if then else runs[1]
    return before, find(runs, now, recipe) if now else runs[0]


def artifacts(store: Store, run: PastRun) -> dict[str, Artifact]:
    """Stage -> what a run made or used and what that was made from, as far as it is still there."""
    held = {stage: found for stage, key in run.keys.items() if (found := store.at(stage, key))}
    by_digest = {artifact.digest: artifact for artifact in store.all()}
    waiting = list(held.values())
    while waiting:
        for name, digest in waiting.pop().manifest["components"].items():
            supplier = by_digest.get(digest) if name.startswith("input/") else None
            if supplier and supplier.stage not in {*held, *run.keys}:
                held[supplier.stage] = supplier
                waiting.append(supplier)
    return held


def artifact(store: Store, run: PastRun, stage: str) -> Artifact:
    """What a run made or used of a stage. Refused if it did neither, or if it is gone."""
    held = artifacts(store, run)
    if stage in held:
        return held[stage]
    if stage in run.keys:
        found, remedy = "was removed since", "To make it again, put recipe and data back and run."
    else:
        found, remedy = "is not in it", f"It made or used: {', '.join(held) or 'nothing'}."
    raise Refused(error(stage, f"that {stage} of run {run.stamp} {found}", "an artifact", remedy))


def _stage(event: journal.Event) -> str:
    return stage if isinstance(stage := event.get("stage"), str) else ""


def _seconds(began: datetime.datetime, ended: journal.Event) -> float | None:
    """None where the event's time cannot be read."""
    try:
        time = datetime.datetime.fromisoformat(str(ended.get("time")))
    except ValueError:
        return None
    # Events were once written without a zone.
    return ((time if time.tzinfo else time.replace(tzinfo=datetime.UTC)) - began).total_seconds()


def _ending(folder: Path, begun: list[str], ended: journal.Event | None) -> str:
    if ended and ended["event"] == "done":
        return "done"
    if ended:
        word = "failed" if ended["event"] == "failed" else "stopped"
        return f"{word} in {_stage(ended) or 'preparation'}"
    if journal.alive(folder):
        return "under way"
    return f"cut off in {begun[-1] if begun else 'preparation'}"
