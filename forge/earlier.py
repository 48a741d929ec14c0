"""The earlier artifact that a stage is compared with, to say why it runs.

Not simply the newest one: after an experiment that was undone, that would name the experiment's parameters
beside what was changed since.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from forge import journal, key, sources
from forge.hashing import Memo
from forge.key import Change, Key
from forge.recipe import Step
from forge.store import Artifact, Store


def artifact(store: Store, recipe: str, executor: str, step: Step, stage_key: Key) -> Artifact | None:
    """Of a stage's artifacts under a recipe, the one that differs least from its present key, rather one of
    the same executor than another. Of several, the one that the last run made or used.
    """
    made = store.made(step.name, recipe)
    if not made:
        return _used(store, recipe, step.name)
    unlike = {a.key: (a.manifest["executor"] != executor, len(_changes(a, step, stage_key))) for a in made}
    least = min(unlike.values())
    alike = {a.key: a for a in made if unlike[a.key] == least}
    last = last_run(store.home, recipe, step.name, alike) if len(alike) > 1 else None
    return alike[last[1]] if last else max(alike.values(), key=lambda a: a.created)


def _used(store: Store, recipe: str, stage: str) -> Artifact | None:
    """What the last run used of a stage of which this recipe made nothing: another recipe made it."""
    for folder in journal.runs(store.home, recipe):
        for name, used_key in journal.places(folder):
            if name == stage and (used := store.at(name, used_key)):
                return used
    return None


def last_run(home: Path, recipe: str, stage: str, keys: Collection[str]) -> tuple[str, str] | None:
    """The last run that made or used an artifact of a stage with one of `keys`: its stamp, and the key."""
    for folder in journal.runs(home, recipe):
        for name, used_key in journal.places(folder):
            if name == stage and used_key in keys:
                return journal.stamp(folder), used_key
    return None


def changes(memo: Memo, earlier: Artifact, step: Step, stage_key: Key) -> list[Change]:
    """What differs from an earlier artifact, with the lines of the user's files where its manifest has them.
    Inputs that are not built yet are left out.
    """
    before = earlier.manifest.get("sources", {})
    return [
        Change(c.component, c.old, c.new, sources.differences(before[c.name], now))
        if c.kind == "source" and c.name in before and (now := _now(memo, step, c.name))
        else c
        for c in _changes(earlier, step, stage_key)
    ]


def _changes(earlier: Artifact, step: Step, stage_key: Key) -> list[Change]:
    undecided = tuple(
        f"input/{name}" for name, supplier in step.inputs.items() if supplier in stage_key.waits
    )
    return key.changes(earlier.manifest["components"], stage_key.components, undecided)


def _now(memo: Memo, step: Step, name: str) -> list[sources.Entry]:
    return sources.described(memo, step.sources.get(name, ()))
