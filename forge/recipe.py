"""A recipe: which stages make a model, with which parameters, from which files.

Reading is strict: everything that is wrong is named at once, each with its line and the nearest valid key.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forge import artifact_types
from forge.artifact_types import Types
from forge.contract import load as load_contract
from forge.contract import nearest
from forge.executors import EXECUTORS
from forge.finding import Refused, error
from forge.image import Image
from forge.parameter import renamed
from forge.reading import Reading
from forge.step import Step, beside, read_step

__all__ = ["LARGEST_SEED", "Recipe", "Step", "find", "load", "nearest_stage"]

_TOP = {
    "name": "str",
    "about": "str",
    "seed": "int",
    "gpu": "str",
    "executor": "str",
    "images": "map",
    "secrets": "map",
    "stages": "map",
    "variants": "map",
}
_RENAMED = {"ways": "variants"}
GPU = ("none", "cuda")
_SUFFIXES = (".yaml", ".yml")
FILE = "recipe.yaml"  # of a recipe that is given as a folder
LARGEST_SEED = 2**32 - 1  # numpy's limit


@dataclass(frozen=True)
class Recipe:
    name: str
    option: str  # what --recipe takes for it, quoted for a shell
    file: Path  # absolute
    text: str  # of the file, as it was read
    about: str
    seed: int
    gpu: str
    executor: str | None
    images: dict[str, Image]  # every image of the repository, with this recipe's build arguments
    secrets: dict[str, Path]
    stages: dict[str, Step]  # in an order in which every input comes before its use
    # this recipe with some parameters changed, to be compared
    variants: dict[str, Recipe] = field(default_factory=dict)

    def on_gpu(self, stage: str) -> bool:
        """Whether `stage` runs on a GPU under this recipe."""
        return self.gpu == "cuda" and self.stages[stage].needs.gpu

    def device(self, stage: str) -> str:
        """The device of `stage` in its job: `cuda` or `cpu`."""
        return "cuda" if self.on_gpu(stage) else "cpu"

    def upstream(self, stage: str) -> set[str]:
        """`stage` and every stage that it is made from."""
        return {stage}.union(*(self.upstream(name) for name in self.stages[stage].inputs.values()))


def find(name: str, repo: Path) -> Path:
    """The file of a recipe given by name (`tiny`), as a folder that holds recipe.yaml, or as a .yaml file.
    Refused if there is none, or if a name in recipes/ is also that of such a folder.
    """
    path, of_repository = Path(name), repo / "recipes" / f"{name}.yaml"
    bare = path.name == name and name not in ("", "..")
    named = bare and of_repository.is_file()
    if (path / FILE).is_file():
        if named:
            raise Refused(
                error(
                    "recipe",
                    f"two of the name {name}: {of_repository} and the folder {path.absolute()}",
                    "one of them",
                    f"Write {os.path.join(os.curdir, name)} for the folder, or the path of the .yaml file.",
                )
            )
        return path / FILE
    if path.suffix in _SUFFIXES and path.is_file():
        return path
    if named:
        return of_repository
    known = sorted(p.stem for p in (repo / "recipes").glob("*.yaml"))
    remedy = nearest(name, known)
    if path.is_dir():
        found = f"no {FILE} in the folder {path.absolute()}"
        others = sorted(str(path / p.name) for p in path.iterdir() if p.suffix in _SUFFIXES)
        remedy = f"Recipes there under other names: {', '.join(others)}" if others else remedy
    elif path.is_file():
        found = f"the file {path.absolute()}, which is no .yaml file"
    elif path.suffix in _SUFFIXES:
        found = f"no file {path.absolute()}"
    elif bare:
        found = f"no recipe {name}, and no folder {path.absolute()}"
    else:
        found = f"no folder {path.absolute()}"
    raise Refused(
        error("recipe", found, f"a name in recipes/, a folder that holds {FILE}, or a .yaml file", remedy)
    )


def named(path: Path, repo: Path) -> str:
    """What `find` takes for the recipe in the file `path`."""
    if path.absolute().parent == (repo / "recipes").absolute():
        return path.stem
    return str(path.parent if path.name == FILE else path)


def load(path: Path, repo: Path) -> Recipe:
    """Reads and checks a recipe of `repo`. Relative paths in it count from its file. Refused with every
    fault it has.
    """
    return _RecipeReading(Path(path), Path(repo)).recipe()


class _RecipeReading(Reading):
    """One reading of one recipe."""

    def recipe(self) -> Recipe:
        top = {}
        for key, value in self.raw.items():
            if key not in _TOP:
                remedy = renamed(_RENAMED[key]) if key in _RENAMED else nearest(key, _TOP)
                self.fault((key,), f"unknown key {key}", "a key of a recipe", remedy)
            elif value is not None:
                top[key] = self.typed((key,), value, _TOP[key])
        for key in ("name", "stages"):
            if key not in top:
                self.fault((), f"no {key}", f"{key}: at the top of the recipe", "Add it.")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", top.get("name") or "unnamed"):
            self.fault(
                ("name",),
                f"name = {top['name']!r}",
                "letters, digits, dots and dashes, since it names folders and tags",
            )
        gpu, executor = top.get("gpu") or "none", top.get("executor")
        if gpu not in GPU:
            self.fault(("gpu",), f"gpu = {gpu!r}", "one of " + ", ".join(GPU))
        if executor is not None and executor not in EXECUTORS:
            self.fault(("executor",), f"executor = {executor!r}", "one of " + ", ".join(EXECUTORS))
        if not 0 <= (top.get("seed") or 0) <= LARGEST_SEED:
            self.fault(("seed",), f"seed = {top['seed']}", f"0 to {LARGEST_SEED}, which every library takes")
        images = self.images(top.get("images") or {})
        secrets = self.secrets(top.get("secrets") or {})
        steps = self.steps(top.get("stages") or {}, images)
        self.check_inputs(steps)
        ordered = self.ordered(steps)
        variants = {
            name: self.variant(name, values or {}, ordered)
            for name, values in (top.get("variants") or {}).items()
        }
        if self.findings:
            raise Refused(self.findings)
        recipe = Recipe(
            name=top["name"],
            option=shlex.quote(named(self.path, self.repo)),
            file=self.path.absolute(),
            text=self.content.decode(errors="replace"),
            about=top.get("about") or "",
            seed=top.get("seed", 0) or 0,
            gpu=gpu,
            executor=executor,
            images=images,
            secrets=secrets,
            stages=ordered,
        )
        return replace(
            recipe,
            variants={
                name: replace(recipe, name=f"{recipe.name}.{name}", stages=stages)
                for name, stages in variants.items()
            },
        )

    def secrets(self, raw: dict[str, Any]) -> dict[str, Path]:
        """Whether the files are there is asked for the stages that will run (preflight.py)."""
        secrets = {}
        for name, text in raw.items():
            if self.typed(("secrets", name), text, "str") is None:
                continue
            secrets[name] = self.located(text)
            if not secrets[name].exists() and (self.repo / text).exists():
                self.fault(
                    ("secrets", name),
                    f"{text}, which does not exist",
                    "a file with the secret",
                    self.where_paths_count_from(text),
                )
        return secrets

    def images(self, raw: dict[str, Any]) -> dict[str, Image]:
        folder = self.repo / "images"
        known = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        arguments: dict[str, dict[str, str]] = {name: {} for name in known}
        for name, values in raw.items():
            if name not in known:
                self.fault(
                    ("images", name), f"unknown image {name}", "a folder of images/", nearest(name, known)
                )
                continue
            for key, value in (self.typed(("images", name), values or {}, "map") or {}).items():
                if self.typed(("images", name, key), value, "str") is not None:
                    arguments[name][key] = value
        return {name: Image(name=name, folder=folder / name, args=args) for name, args in arguments.items()}

    # --- stages ---------------------------------------------------------------------------------------------

    def steps(self, raw: dict[str, Any], images: dict[str, Image]) -> dict[str, Step]:
        folder = self.repo / "stages"
        known = sorted(p.parent.name for p in folder.glob("*/stage.toml"))
        steps = {}
        try:
            types = artifact_types.load(folder)
        except Refused as refused:
            raise Refused([*self.findings, *refused.findings]) from None
        for name, values in raw.items():
            where = ("stages", name)
            if name not in known:
                new = self.renamed_stages(known, types).get(name)
                self.fault(
                    where,
                    f"unknown stage {name}",
                    "a folder of stages/ with a stage.toml",
                    renamed(new) if new else nearest(name, known),
                )
                continue
            try:
                contract = load_contract(folder / name, types)
            except Refused as refused:
                self.findings += refused.findings
                continue
            if contract.image not in images:
                self.fault(
                    where,
                    f"image {contract.image} in the contract of {name}",
                    "a folder of images/",
                    nearest(contract.image, images),
                )
            values = self.typed(where, values or {}, "map")
            if values is not None:
                steps[name] = read_step(self, name, contract, values)
        return steps

    def renamed_stages(self, known: list[str], types: Types) -> dict[str, str]:
        """A stage's name before -> its name, of all stages of the repository."""
        names = {}
        for name in known:
            # The faults of a contract are named where the recipe has its stage.
            with contextlib.suppress(Refused):
                names[load_contract(self.repo / "stages" / name, types).was] = name
        return names

    def variant(self, name: str, values: Any, steps: dict[str, Step]) -> dict[str, Step]:
        """The stages with the parameters that one variant changes."""
        where = ("variants", name)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            self.fault(where, f"the variant {name!r}", "letters, digits and dashes, since it names folders")
        changed, said = dict(steps), {(f.found, f.expected) for f in self.findings}
        before = len(self.findings)
        for stage, raw in (self.typed(where, values, "map") or {}).items():
            if stage not in steps:
                self.fault(
                    (*where, stage),
                    f"unknown stage {stage} in the variant {name}",
                    "a stage of this recipe",
                    nearest_stage(stage, steps),
                )
            elif (given := self.typed((*where, stage), raw or {}, "map")) is not None:
                kept = beside(self.raw["stages"][stage] or {}, given, steps[stage].contract)
                changed[stage] = read_step(
                    self, stage, steps[stage].contract, {**kept, **given}, (*where, stage)
                )
        # What the variant has from the recipe's own stages has been named there, with its line.
        self.findings[before:] = [f for f in self.findings[before:] if (f.found, f.expected) not in said]
        return changed

    def check_inputs(self, steps: dict[str, Step]) -> None:
        for step in steps.values():
            for name, supplier in step.inputs.items():
                where = ("stages", step.name, "inputs", name)
                if supplier not in steps:
                    # a stage that is there and broken has been named already
                    if supplier not in self.raw["stages"]:
                        self.fault(
                            where,
                            f"input {name} of {step.name} from {supplier}, which the recipe does not have",
                            "a stage of this recipe",
                            nearest_stage(supplier, steps),
                        )
                elif (produced := steps[supplier].contract.produces) != (
                    consumed := step.contract.consumes[name]
                ):
                    self.fault(
                        where,
                        f"the {produced} of {supplier} as input {name} of {step.name}",
                        consumed,
                        f"Give it a stage that produces {consumed}.",
                    )

    def ordered(self, steps: dict[str, Step]) -> dict[str, Step]:
        """In the recipe's order, as far as every input comes before its use."""
        done: dict[str, Step] = {}
        left = dict(steps)
        while left:
            ready = next((s for s in left.values() if all(i not in left for i in s.inputs.values())), None)
            if ready is None:
                circle = " -> ".join(left)
                self.fault(
                    ("stages", next(iter(left))),
                    f"stages that wait for each other ({circle})",
                    "no cycle",
                    "Change their inputs.",
                )
                return done
            done[ready.name] = left.pop(ready.name)
        return done


def nearest_stage(name: str, stages: Mapping[str, Step]) -> str:
    """A sentence that names the stage that has the name now, or else the one whose name is closest."""
    new = next((new for new, step in stages.items() if step.contract.was == name), None)
    return renamed(new) if new else nearest(name, stages)
