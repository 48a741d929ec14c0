"""A stage's key: named components and their digest, and what to say when one has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge import code, hashing, image, typed_parameters
from forge.executors import EXECUTORS
from forge.program import Program
from forge.recipe import Recipe, Step


@dataclass(frozen=True)
class Key:
    """`sha256` is None while an input has no artifact yet; `waits` names the stages that must run first."""

    components: dict[str, str]
    waits: tuple[str, ...] = ()

    @property
    def sha256(self) -> str | None:
        return None if self.waits else hashing.of_value(self.components)


def of_step(
    step: Step,
    recipe: Recipe,
    repo: Path,
    executor: str,
    memo: hashing.Memo,
    gpu: str,
    digest: Callable[[str], str | None],
) -> Key:
    """The key of `step`. `digest` gives the content digest of a stage's artifact, None if it is not built;
    `gpu` is the GPU's architecture or "none".

    Keys use content digests, not timestamps: if an input is rebuilt with identical content, no downstream key
    changes.
    """
    contract = step.contract
    files = code.closure(repo, step.name, contract.apart)
    components = {
        f"code/{path}": memo.file(repo / path)
        for path in files
        if not typed_parameters.follows(contract, repo / path)  # each parameter comes in below
    }
    components |= image.components(recipe.images[contract.image], executor)
    dockerfile = Program(step.name, recipe.images[contract.image], repo).dockerfile
    if EXECUTORS[executor].images and dockerfile.is_file():
        components[f"image/{dockerfile.relative_to(repo)}"] = memo.file(dockerfile)
    if step.contract.product:
        product = image.components(recipe.images[step.contract.product.image], executor)
        components |= {f"product/{name.removeprefix('image/')}": value for name, value in product.items()}
    components |= {f"param/{name}": _shown(value) for name, value in step.params.items()}
    components |= {f"source/{name}": memo.source(paths) for name, paths in step.sources.items()}
    components["type"] = step.contract.produces
    components["seed"] = str(recipe.seed)
    components["gpu"] = gpu if recipe.on_gpu(step.name) else "none"
    waits = []
    for name, supplier in step.inputs.items():
        if (content := digest(supplier)) is None:
            waits.append(supplier)
        else:
            components[f"input/{name}"] = content
    return Key(components, tuple(waits))


def _shown(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Change:
    """`details`: of a source, what changed in which file, where the manifest says it."""

    component: str
    old: str | None
    new: str | None
    details: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """`code`, `image`, `param`, ...: what stands before the slash."""
        return self.component.partition("/")[0]

    @property
    def name(self) -> str:
        """`rank`, `stages/train/fit.py`, ...: what stands behind the slash."""
        return self.component.partition("/")[2].removeprefix("arg/")

    @property
    def subject(self) -> str:
        """What changed, as the subject of a sentence."""
        return {
            "code": f"the code {self.name}",
            "image": f"the image's {self.name}",
            "product": f"the serving image's {self.name}",
            "param": f"the parameter {self.name}",
            "input": f"the input {self.name}",
            "source": f"the source {self.name}",
            "seed": "the seed",
            "gpu": "the GPU architecture",
            "type": "the artifact type",
        }.get(self.kind, self.component)

    @property
    def phrase(self) -> str:
        """One line for a person: what changed, from what to what."""
        if self.details:
            more = len(self.details) - 1
            return f"{self.subject}: {self.details[0]}" + (f" (and {more} more files)" if more else "")
        old, new = _short(self.old), _short(self.new)
        if self.old is None:
            return f"{self.subject} is new" + (f" ({new})" if new else "")
        if self.new is None:
            return f"{self.subject} is gone" + (f" (it was {old})" if old else "")
        if not old or not new:
            return f"{self.subject} {'was edited' if self.kind == 'code' else 'has other content'}"
        return f"{self.subject} changed: {old} -> {new}"

    def as_json(self) -> dict[str, Any]:
        whole = {"component": self.component, "old": self.old, "new": self.new}
        return {**whole, "phrase": self.phrase, "details": self.details}


def _short(value: str | None) -> str:
    """A value up to a length that still fits a line; "" for a digest, which says nothing to a person."""
    value = value or ""
    if len(value) == 64 and all(c in "0123456789abcdef" for c in value):
        return ""
    return value if len(value) <= 60 else value[:57] + "..."


def changes(old: dict[str, str], new: dict[str, str], undecided: tuple[str, ...] = ()) -> list[Change]:
    """What differs, in the order code, image, parameters, inputs... `undecided` components are not known
    yet.
    """
    order = ["code", "image", "product", "param", "input", "source", "seed", "gpu", "type"]
    names = [n for n in {**old, **new} if old.get(n) != new.get(n) and n not in undecided]
    names.sort(
        key=lambda n: (order.index(n.partition("/")[0]) if n.partition("/")[0] in order else len(order), n)
    )
    return [Change(n, old.get(n), new.get(n)) for n in names]
