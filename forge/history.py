"""Earlier runs of a recipe: what each made and why, how it ended, and what of it is left."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forge import journal
from forge.store import Store


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
    artifacts = {stage: store.at(stage, key) for stage, key in made.items()}
    return PastRun(
        name=folder.name,
        stamp=journal.stamp(folder),
        executor=str(plan.get("executor", "")),
        began=began,
        seconds=_seconds(began, ended) if ended else None,
        ending=_ending(folder, [stage for stage, _ in begun], ended),
        made=tuple(made),
        why=begun[0][1] if begun else "",
        keys=dict(journal.places_in(plan, events)),
        bytes=sum(artifact.bytes for artifact in artifacts.values() if artifact),
        gone=tuple(stage for stage, artifact in artifacts.items() if not artifact),
    )


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
