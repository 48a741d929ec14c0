"""What the home and the engine hold, what of it is still needed, and removing the rest."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forge import journal, lock, modes, plan, preflight, store
from forge import recipe as recipes
from forge.executor import Executor, ImageKeeper, KeptImage
from forge.executor.local import Local
from forge.executors import EXECUTORS
from forge.finding import Finding, Refused, warning
from forge.plan import Context
from forge.reading import raw_name
from forge.store import Artifact, Store

RECENT, SERVED = "a recent run", "the server"
Place = tuple[str, str]  # stage and key

_ENVIRONMENT = re.compile(r"(.+)-[0-9a-f]{12}")  # an image and its fingerprint


@dataclass(frozen=True)
class Item:
    """Something that takes space. `users`: recipes and runs that need it; nothing removes what has some.
    `tag` is an image of the engine, `path` everything else.
    """

    kind: str  # artifact, scratch, environment or image
    name: str
    bytes: int
    created: datetime.datetime
    users: tuple[str, ...] = ()
    path: Path | None = None
    tag: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "bytes": self.bytes,
            "created": self.created.isoformat(timespec="seconds"),
            "used_by": list(self.users),
            "path": str(self.path or ""),
        }


@dataclass
class Needed:
    """Who needs what: artifacts and scratch by stage and key, environments and images by name. Of the recipes
    in `unknown` all is needed, since their plan cannot be made; `findings` say why.
    """

    places: dict[Place, set[str]] = field(default_factory=dict)
    names: dict[str, set[str]] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)

    def add(self, user: str, places: Iterable[Place], names: Iterable[str] = ()) -> None:
        for place in places:
            self.places.setdefault(place, set()).add(user)
        for name in names:
            self.names.setdefault(name, set()).add(user)


def items(context: Context, executor: Executor, keep: int) -> tuple[list[Item], list[Finding]]:
    """Everything that takes space, and what could not be looked at. Needed is what the recipes of the
    repository (and `context`) need by their present plan, what is being served, what the last `keep` runs
    of each recipe made or used, and what those artifacts were made from.
    """
    needed, built = Needed(), context.store.all()
    _by_recipes(needed, context, executor)
    kept = executor.kept() if isinstance(executor, ImageKeeper) else []
    for folder in _recent_runs(context.store.home, keep):
        needed.add(RECENT, journal.places(folder), _started(folder, kept))
    needed.add(SERVED, _served(context.store, built))
    for artifact in built:
        name = str(artifact.manifest["recipe"])
        if any(f"{name}.".startswith(f"{unknown}.") for unknown in needed.unknown):  # or a variant of it
            needed.add(name, [(artifact.stage, artifact.key)])
    _with_inputs(needed, built)
    listed = [*_of_artifacts(needed, built), *_of_scratch(context.store, needed)]
    listed += _of_environments(context, needed)
    listed += _of_images(kept, needed)
    return listed, needed.findings


# --- what is needed -----------------------------------------------------------------------------------------


def _by_recipes(needed: Needed, context: Context, executor: Executor) -> None:
    """What the recipes of the repository need, their variants and every executor's artifacts included."""
    loaded = {context.recipe.name: context.recipe}
    for path in sorted((context.repo / "recipes").glob("*.yaml")):
        try:
            recipe = recipes.load(path, context.repo)
            loaded[recipe.name] = recipe
        except Refused as refused:
            needed.unknown |= {path.stem, raw_name(path)}
            needed.findings.append(_unknown(path.name, str(refused.findings[0])))
    gpu = preflight.gpu_architecture() if any(r.gpu == "cuda" for r in loaded.values()) else None
    for recipe in loaded.values():
        if recipe.gpu == "cuda" and gpu is None:
            needed.unknown.add(recipe.name)
            needed.findings.append(_unknown(recipe.name, "no GPU that nvidia-smi can see"))
        for variant in (recipe, *recipe.variants.values()):
            for name in EXECUTORS:
                own = replace(context, recipe=variant, executor=name, gpu=gpu or "none")
                needed.add(recipe.name, _places(own), _names(own, executor))


def _unknown(subject: str, found: str) -> Finding:
    expected = "a recipe whose plan says which artifacts it needs"
    return warning(subject, found, expected, "All of its artifacts count as needed.")


def _places(context: Context) -> list[Place]:
    """The artifacts and scratch of a recipe's present plan, by one executor."""
    planned = [(s.name, s.key.sha256) for s in plan.make(context).stages]
    lying = [(a.stage, a.key) for a in plan.recorded(context).values()]
    return [*lying, *((name, key) for name, key in planned if key)]


def _names(context: Context, executor: Executor) -> list[str]:
    """The environments and images of the engine that a recipe's stages run in."""
    steps = context.recipe.stages.values()
    images = [context.recipe.images[step.contract.image] for step in steps]
    names = [Local(context.repo, context.store.home).environment(image).name for image in images]
    if isinstance(executor, ImageKeeper):
        names += executor.tags(images, [plan.program(context, step) for step in steps])
    return names


def _recent_runs(home: Path, keep: int) -> list[Path]:
    return [folder for name in journal.recipes(home) for folder in journal.runs(home, name)[:keep]]


def _started(folder: Path, kept: list[KeptImage]) -> list[str]:
    """The images whose containers a run started, by its scripts, which can start them again."""
    scripts = [path.read_text(errors="replace") for path in folder.glob("*.sh") if path.is_file()]
    return [image.tag for image in kept if any(image.tag in script for script in scripts)]


def _served(whole: Store, built: list[Artifact]) -> list[Place]:
    """The artifacts that serving.json names, whatever else it holds."""
    try:
        text = json.dumps(json.loads((whole.home / preflight.SERVING).read_bytes()))
    except (FileNotFoundError, ValueError, RecursionError):
        return []
    return [(artifact.stage, artifact.key) for artifact in built if artifact.key in text]


def _with_inputs(needed: Needed, built: list[Artifact]) -> None:
    """Adds what each needed artifact was made from: of several with the same content, one is enough."""
    by_digest: dict[str, list[Artifact]] = {}
    for artifact in built:
        by_digest.setdefault(artifact.digest, []).append(artifact)
    by_place = {(artifact.stage, artifact.key): artifact for artifact in built}
    waiting = list(needed.places)
    while waiting:
        place = waiting.pop()
        components = by_place[place].manifest["components"] if place in by_place else {}
        for name, digest in components.items():
            candidates = by_digest.get(digest, []) if name.startswith("input/") else []
            served = set().union(*(needed.places.get((a.stage, a.key), ()) for a in candidates))
            if candidates and (missing := needed.places[place] - served):
                newest = max(candidates, key=lambda artifact: artifact.created)
                for user in missing:
                    needed.add(user, [(newest.stage, newest.key)])
                waiting.append((newest.stage, newest.key))


# --- what there is ------------------------------------------------------------------------------------------


def _of_artifacts(needed: Needed, built: list[Artifact]) -> list[Item]:
    return [
        Item(
            "artifact",
            f"{a.stage}/{a.key[:12]}",
            a.bytes,
            a.created,
            tuple(sorted(needed.places.get((a.stage, a.key), ()))),
            a.folder,
        )
        for a in built
    ]


def _of_scratch(whole: Store, needed: Needed) -> list[Item]:
    return [
        Item(
            "scratch",
            f"{folder.parent.name}/{folder.name[:12]}",
            _size(folder),
            _changed(folder),
            tuple(sorted(needed.places.get((folder.parent.name, folder.name), ()))),
            folder,
        )
        for folder in sorted(whole.root.glob("scratch/*/*"))
        if folder.is_dir()
    ]


def _of_environments(context: Context, needed: Needed) -> list[Item]:
    """The local executor's environments of this repository's images; others are somebody else's."""
    images = {folder.name for folder in (context.repo / "images").glob("*")}
    folders = sorted((context.store.home / "envs").glob("*"))
    return [
        Item(
            "environment",
            folder.name,
            _size(folder),
            _changed(folder),
            tuple(sorted(needed.names.get(folder.name, ()))),
            folder,
        )
        for folder in folders
        if (name := _ENVIRONMENT.fullmatch(folder.name)) and name[1] in images
    ]


def _of_images(kept: list[KeptImage], needed: Needed) -> list[Item]:
    """The images that forge made. One that holds an artifact is needed as long as that is."""
    users = {key: names for (_, key), names in needed.places.items()}
    return [
        Item(
            "image",
            image.tag,
            image.bytes,
            image.created,
            tuple(sorted(users.get(image.key, set()) | needed.names.get(image.tag, set()))),
            tag=image.tag,
        )
        for image in kept
    ]


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a run under way removes files
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _changed(path: Path) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(path.lstat().st_mtime, datetime.UTC)


# --- removing -----------------------------------------------------------------------------------------------


def remove(context: Context, executor: Executor, keep: int) -> tuple[list[Item], list[Finding]]:
    """Removes what nothing needs; what went, and what stayed against that. Refused if a run is under way.

    What is removed is renamed into `store/tmp` first: a crash leaves every artifact whole or gone.
    """
    whole = context.store
    with lock.held(whole.root / "lock", False, lambda owner: None):
        whole.clean()
        listed, findings = items(context, executor, keep)
        gone = [item for item in listed if not item.users]
        for item in gone:
            if item.path:
                _remove_folder(whole, item.kind, item.path)
        stayed = set()
        for item in gone:
            if item.tag and isinstance(executor, ImageKeeper) and (finding := executor.remove(item.tag)):
                findings.append(finding)
                stayed.add(item)
    return [item for item in gone if item not in stayed], findings


def _remove_folder(whole: Store, kind: str, folder: Path) -> None:
    if kind == "environment":  # may lie on another disk; without this file it counts as not made
        (folder / ".ready").unlink(missing_ok=True)
        modes.sync(folder)
        store.remove(folder)
        return
    whole.discard(folder)
