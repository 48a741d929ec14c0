"""What two runs made differently, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from forge import history, key, sources
from forge.history import PastRun
from forge.key import Change
from forge.store import Artifact, Store

State = Literal["same", "other", "gone", "only then", "only now"]


@dataclass(frozen=True)
class StageDifference:
    """A stage in two runs. `same`: both have the same content. `changes`: what it was made from that differs,
    other than artifacts. `gone`: an artifact was removed, so that its changes are not known.
    """

    stage: str
    state: State
    then: Artifact | None
    now: Artifact | None
    changes: tuple[Change, ...] = ()

    def as_json(self) -> dict[str, Any]:
        changes = [change.as_json() for change in self.changes]
        keys = {name: a and a.key for name, a in (("then", self.then), ("now", self.now))}
        return {"stage": self.stage, "state": self.state, **keys, "changes": changes}


def of_runs(store: Store, then: PastRun, now: PastRun, order: Iterable[str]) -> Iterator[StageDifference]:
    """Every stage that one of the two runs made or used, those of `order` first."""
    before, after = history.artifacts(store, then), history.artifacts(store, now)
    was, is_now = {*then.keys, *before}, {*now.keys, *after}
    for stage in dict.fromkeys([*order, *then.keys, *now.keys]):
        old, new = before.get(stage), after.get(stage)
        if stage not in was | is_now:
            continue
        if stage not in was & is_now:
            yield StageDifference(stage, "only then" if stage in was else "only now", old, new)
        elif old and new:
            state: State = "same" if old.digest == new.digest else "other"
            yield StageDifference(stage, state, old, new, tuple(_changes(old, new)))
        else:
            state = "same" if then.keys.get(stage) == now.keys.get(stage) else "gone"
            yield StageDifference(stage, state, old, new)


def _changes(old: Artifact, new: Artifact) -> Iterator[Change]:
    then, now = old.manifest.get("sources", {}), new.manifest.get("sources", {})
    for change in key.changes(old.manifest["components"], new.manifest["components"]):
        if change.kind == "source" and change.name in then and change.name in now:
            details = sources.differences(then[change.name], now[change.name])
            yield Change(change.component, change.old, change.new, details)
        elif change.kind != "input":
            yield change
