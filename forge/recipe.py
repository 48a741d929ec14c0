"""A recipe: which stages make a model, with which parameters, from which files.

Reading is strict: everything that is wrong is named at once, each with its line and the nearest valid key.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from forge import artifact_types
from forge.artifact_types import Types
from forge.contract import NEEDS_TYPES, Contract, Needs, convert, nearest
from forge.contract import load as load_contract
from forge.executor import EXECUTORS
from forge.finding import Finding, Refused, error
from forge.image import Image
from forge.parameter import Fault, Unfit, renamed

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
_GPU = ("none", "cuda")
LARGEST_SEED = 2**32 - 1  # numpy's limit
_RESERVED = ("inputs", "sources", "needs")


@dataclass(frozen=True)
class Step:
    """One stage of a recipe: its contract with everything the recipe says filled in."""

    name: str
    contract: Contract
    params: dict[str, Any]
    inputs: dict[str, str]  # input name -> the stage that supplies it
    sources: dict[str, tuple[Path, ...]]
    needs: Needs


@dataclass(frozen=True)
class Recipe:
    name: str
    option: str  # what --recipe takes for it
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
    """The file of a recipe given by name (`tiny`) or by path."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    path = repo / "recipes" / f"{name}.yaml"
    if path.is_file():
        return path
    known = sorted(p.stem for p in (repo / "recipes").glob("*.yaml"))
    raise Refused(
        error(
            "recipe",
            f"no recipe {name}",
            "a name in recipes/ or the path of a .yaml file",
            nearest(name, known),
        )
    )


def load(path: Path, repo: Path) -> Recipe:
    """Reads and checks a recipe. Relative paths in it count from `repo`. Refused with every fault it has."""
    return _Reading(Path(path), Path(repo)).recipe()


class _Reading:
    """One reading of one file: collects findings on the way."""

    def __init__(self, path: Path, repo: Path):
        self.path, self.repo = path, repo
        self.findings: list[Finding] = []
        self.lines: dict[tuple[str, ...], int] = {}
        self.raw = self._parse()

    # --- YAML, with the line of every key -------------------------------------------------------------------

    def _parse(self) -> dict[str, Any]:
        try:
            loader = yaml.SafeLoader(self.path.read_bytes())
            root = loader.get_single_node()
        except yaml.YAMLError as fault:
            mark = getattr(fault, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise Refused(
                error(
                    f"{self.path.name}{line}",
                    getattr(fault, "problem", str(fault)),
                    "YAML",
                    "Mend that line.",
                )
            ) from fault
        if not isinstance(root, yaml.MappingNode):
            raise Refused(error(self.path.name, "no mapping", "keys such as name and stages", ""))
        values: dict[str, Any] = self._value(loader, root, ())
        return values

    def _value(self, loader: yaml.SafeLoader, node: yaml.Node, where: tuple[str, ...]) -> Any:
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(loader.construct_object(key_node, deep=True))
                if key in values:
                    first = self.lines[(*where, key)]
                    self.findings.append(
                        error(
                            f"{self.path.name}:{key_node.start_mark.line + 1}",
                            f"{key} a second time",
                            f"each key once (the first is in line {first})",
                            "Remove one of the two.",
                        )
                    )
                self.lines[(*where, key)] = key_node.start_mark.line + 1
                values[key] = self._value(loader, value_node, (*where, key))
            return values
        return loader.construct_object(node, deep=True)

    def fault(self, where: tuple[str, ...], found: str, expected: str, remedy: str = "") -> None:
        known = where
        while known and known not in self.lines:
            known = known[:-1]
        line = f":{self.lines[known]}" if known else ""
        self.findings.append(error(f"{self.path.name}{line}", found, expected, remedy))

    def typed(self, where: tuple[str, ...], value: Any, kind: str) -> Any:
        try:
            return convert(value, kind)
        except TypeError:
            self.fault(where, f"{'.'.join(where)} = {value!r}", kind, "")
            return None

    # --- the whole ------------------------------------------------------------------------------------------

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
        if gpu not in _GPU:
            self.fault(("gpu",), f"gpu = {gpu!r}", "one of " + ", ".join(_GPU))
        if executor is not None and executor not in EXECUTORS:
            self.fault(("executor",), f"executor = {executor!r}", "one of " + ", ".join(EXECUTORS))
        if not 0 <= (top.get("seed") or 0) <= LARGEST_SEED:
            self.fault(("seed",), f"seed = {top['seed']}", f"0 to {LARGEST_SEED}, which every library takes")
        images = self.images(top.get("images") or {})
        secrets = {
            name: self.repo / Path(path).expanduser()
            for name, path in (top.get("secrets") or {}).items()
            if self.typed(("secrets", name), path, "str") is not None
        }
        steps = self.steps(top.get("stages") or {}, images)
        self.check_inputs(steps)
        ordered = self.ordered(steps)
        variants = {
            name: self.variant(name, values or {}, ordered)
            for name, values in (top.get("variants") or {}).items()
        }
        if self.findings:
            raise Refused(self.findings)
        home = self.path.absolute().parent == (self.repo / "recipes").absolute()
        option = self.path.stem if home else str(self.path)
        recipe = Recipe(
            name=top["name"],
            option=option,
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
                steps[name] = self.step(name, contract, values)
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
                kept = _beside(self.raw["stages"][stage] or {}, given, steps[stage].contract)
                changed[stage] = self.step(stage, steps[stage].contract, {**kept, **given}, (*where, stage))
        # What the variant has from the recipe's own stages has been named there, with its line.
        self.findings[before:] = [f for f in self.findings[before:] if (f.found, f.expected) not in said]
        return changed

    def step(
        self, name: str, contract: Contract, values: dict[str, Any], where: tuple[str, ...] = ()
    ) -> Step:
        where = where or ("stages", name)
        for key in values:
            if key not in contract.parameters and key not in _RESERVED:
                new = next(
                    (to for to, parameter in contract.parameters.items() if parameter.was == key), None
                )
                remedy = renamed(new) if new else nearest(key, [*contract.parameters, *_RESERVED])
                self.fault((*where, key), f"unknown key {name}.{key}", f"a parameter of {name}", remedy)
        params = {}
        for key, parameter in contract.parameters.items():
            if key in values:
                try:
                    params[key] = parameter.accept(values[key])
                except Unfit as unfit:
                    for fault in unfit.faults:
                        self.unfit((*where, key), name, fault)
            elif parameter.required:
                self.fault(where, f"no {key} in {name}", f"{key}: {parameter.expected}", parameter.doc)
            else:
                params[key] = parameter.accept(parameter.default)
        for key, parameter in contract.parameters.items():
            limit = params.get(parameter.at_most)
            if limit and key in params and params[key] > limit:
                unsaid = "" if key in values else " (the default)"
                self.fault(
                    (*where, key),
                    f"{name}.{key} = {params[key]!r}{unsaid}",
                    f"at most {parameter.at_most}, which is {limit!r}",
                    parameter.doc,
                )
            other = parameter.instead_of
            if other in values and key in values and params.get(key, parameter.default) != parameter.default:
                found = f"{name}.{key} = {params[key]!r} and {name}.{other} = {values[other]!r}"
                self.fault(
                    (*where, key),
                    found,
                    f"one of {key} and {other}",
                    f"Leave out {other} to use {key}, or {key} to use {other}.",
                )
        inputs = {key: key for key in contract.consumes}
        for key, value in (self.typed((*where, "inputs"), values.get("inputs") or {}, "map") or {}).items():
            if key not in contract.consumes:
                self.fault(
                    (*where, "inputs", key),
                    f"unknown input {key}",
                    f"an input of {name}",
                    nearest(key, contract.consumes),
                )
            elif self.typed((*where, "inputs", key), value, "str") is not None:
                inputs[key] = value
        return Step(
            name,
            contract,
            params,
            inputs,
            self.sources(name, contract, values),
            self.needs(name, contract, values),
        )

    def unfit(self, where: tuple[str, ...], name: str, fault: Fault) -> None:
        """A finding for one fault of the parameter at `where` of the stage `name`."""
        path = ".".join((name, where[-1], *fault.where))
        found = f"unknown key {path}" if fault.found.startswith("unknown key ") else f"{path} = {fault.found}"
        self.fault((*where, *fault.where), found, fault.expected, fault.remedy)

    def sources(self, name: str, contract: Contract, values: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
        where = ("stages", name, "sources")
        given = self.typed(where, values.get("sources") or {}, "map") or {}
        for key in given:
            if key not in contract.sources:
                self.fault(
                    (*where, key),
                    f"unknown source {key}",
                    f"a source of {name}",
                    nearest(key, contract.sources),
                )
        sources = {}
        for key, source in contract.sources.items():
            if key not in given or given[key] in (None, []):
                if not source.optional:
                    self.fault(where, f"no source {key} in {name}", f"sources: {{{key}: ...}}", source.doc)
                continue
            listed = [given[key]] if isinstance(given[key], str) else given[key]
            listed = self.typed((*where, key), listed, "list[str]")
            if listed is None:
                continue
            if not source.many and len(listed) != 1:
                self.fault((*where, key), f"{len(listed)} paths in {name}.sources.{key}", "exactly one")
            paths = tuple(self.repo / Path(text).expanduser() for text in listed)
            for path, text in zip(paths, listed, strict=False):
                if not path.exists():
                    self.fault(
                        (*where, key),
                        f"{text}, which does not exist",
                        f"a file or folder ({source.doc})",
                        "Paths count from the repository's root.",
                    )
            sources[key] = paths
        return sources

    def needs(self, name: str, contract: Contract, values: dict[str, Any]) -> Needs:
        where = ("stages", name, "needs")
        changed = {}
        for key, value in (self.typed(where, values.get("needs") or {}, "map") or {}).items():
            if key not in NEEDS_TYPES:
                self.fault(
                    (*where, key),
                    f"unknown key {name}.needs.{key}",
                    "a key of needs",
                    nearest(key, NEEDS_TYPES),
                )
            elif (checked := self.typed((*where, key), value, NEEDS_TYPES[key])) is not None:
                if checked < 0:
                    self.fault((*where, key), f"{name}.needs.{key} = {checked:g}", "0 or more")
                changed[key] = checked
        return replace(contract.needs, **changed)

    def check_inputs(self, steps: dict[str, Step]) -> None:
        for step in steps.values():
            for name, supplier in step.inputs.items():
                where = ("stages", step.name, "inputs", name)
                if supplier not in steps:
                    # a stage that is there and broken has been named already
                    if supplier not in self.raw["stages"]:
                        self.fault(
                            where,
                            f"input {name} of {step.name} comes from {supplier}, which the recipe does not"
                            " have",
                            "a stage of this recipe",
                            nearest_stage(supplier, steps),
                        )
                elif (produced := steps[supplier].contract.produces) != (
                    consumed := step.contract.consumes[name]
                ):
                    self.fault(
                        where,
                        f"input {name} of {step.name} is the {produced} of {supplier}",
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


def _beside(values: dict[str, Any], given: dict[str, Any], contract: Contract) -> dict[str, Any]:
    """The recipe's `values` of a stage that stay beside those that a variant gives.

    Of two parameters that stand instead of each other, the one that the variant gives replaces the other.
    """
    replaced = set()
    for key, parameter in contract.parameters.items():
        if key in given and given[key] != parameter.default:
            replaced.add(parameter.instead_of)
        if parameter.instead_of in given:
            replaced.add(key)
    return {key: value for key, value in values.items() if key not in replaced}
