"""A stage's contract, `stages/<name>/stage.toml`: what it takes, what it gives, what it needs."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge.finding import Finding, Refused, error

# Artifact type -> patterns of which each must match at least one file (docs/formats.md).
TYPES: dict[str, tuple[str, ...]] = {
    "hf-checkpoint": (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "*.safetensors",
    ),
    "chat-dataset": (
        "train.jsonl", "eval.jsonl", "prompt.txt", "tools.json", "stats.json", "tokens.png", "rejects.jsonl",
    ),
    "peft-adapter": (
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "training.json", "loss.jsonl", "loss.png",
    ),
    "nvfp4-checkpoint": ("config.json", "hf_quant_config.json", "tokenizer.json", "*.safetensors", "audit.json"),
    "report": ("report.json", "report.md", "behaviour.png", "answers.jsonl", "exchange.json"),
    "serving": ("serve.json", "check.json", "prompt.txt", "tools.json", "README.md"),
}

_SCALARS: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}
_PARAMETER_TYPES = (*_SCALARS, "list[str]", "list[int]", "map")
_MISSING: Any = object()


def nearest(word: str, choices: Iterable[str]) -> str:
    """A sentence that names the valid word closest to `word`, or all of them."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]}?"
    return f"Valid here: {', '.join(choices)}." if choices else "Nothing is valid here."


def convert(value: Any, kind: str) -> Any:
    """`value` as a parameter of type `kind`; TypeError if it is of another type.

    An int stands for a float. YAML 1.1 reads `1e-3` (no dot) as a string, so a string that is a number does too.
    """
    if kind == "float" and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            raise TypeError(kind) from None
        if not math.isfinite(number):
            raise TypeError(kind)
        return number
    if kind in _SCALARS:
        # bool is a subclass of int: `rank: true` must not become 1.
        if isinstance(value, _SCALARS[kind]) and (kind == "bool" or not isinstance(value, bool)):
            return value
    elif kind.startswith("list[") and isinstance(value, list):
        return [convert(item, kind[5:-1]) for item in value]
    elif kind == "map" and isinstance(value, dict):
        return value
    raise TypeError(kind)


@dataclass(frozen=True)
class Parameter:
    type: str
    doc: str = ""
    default: Any = _MISSING
    choices: tuple[Any, ...] = ()
    min: float | None = None
    max: float | None = None

    @property
    def required(self) -> bool:
        return self.default is _MISSING

    @property
    def expected(self) -> str:
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        limits = [f"at least {self.min:g}"] if self.min is not None else []
        limits += [f"at most {self.max:g}"] if self.max is not None else []
        return f"{self.type} {' and '.join(limits)}".strip()

    def accept(self, value: Any) -> Any:
        """The value, converted; TypeError or ValueError if it is not one this parameter takes."""
        value = convert(value, self.type)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.choices and value not in self.choices:
            raise ValueError(value)
        if number and ((self.min is not None and value < self.min) or (self.max is not None and value > self.max)):
            raise ValueError(value)
        return value


@dataclass(frozen=True)
class Source:
    doc: str = ""
    many: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Secret:
    doc: str = ""


@dataclass(frozen=True)
class Needs:
    """What one run takes; `gpu` says that the stage uses the GPU where the recipe has one."""

    gpu: bool = False
    network: bool = False
    memory_gb: float = 1.0
    disk_gb: float = 0.1
    minutes: float = 1.0


NEEDS_TYPES = {"gpu": "bool", "network": "bool", "memory_gb": "float", "disk_gb": "float", "minutes": "float"}


@dataclass(frozen=True)
class Product:
    """An image made from the stage's output (`[build]`): its name, and for each value of the parameter `by` context name -> input name, or a folder in it."""

    image: str
    by: str
    contexts: dict[str, dict[str, str]]

    def folders(self, params: dict[str, Any], folder: Callable[[str], Path]) -> dict[str, Path | None]:
        """Context name -> folder under these parameters, None for a context that only other values have; `folder` gives that of an input."""
        chosen = {context: place.partition("/") for context, place in self.contexts[params[self.by]].items()}
        return dict.fromkeys(name for contexts in self.contexts.values() for name in contexts) | {
            context: folder(supplier) / below for context, (supplier, _, below) in chosen.items()}


@dataclass(frozen=True)
class Contract:
    name: str
    folder: Path
    summary: str
    image: str
    produces: str
    consumes: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)
    product: Product | None = None


def _product(name: str, raw: dict[str, Any], parameters: dict[str, Parameter], consumes: dict[str, str], findings: list[Finding]) -> Product | None:
    if set(raw) != {"image", "by", "contexts"} or not isinstance(raw["contexts"], dict):
        findings.append(error(name, f"[build] with {', '.join(raw) or 'nothing'}", "image, by and contexts", "docs/formats.md says what it holds."))
        return None
    choices = parameters[raw["by"]].choices if raw["by"] in parameters else ()
    if set(choices) != set(raw["contexts"]):
        findings.append(error(name, f"build.contexts for {', '.join(raw['contexts'])}", f"one for each choice of the parameter {raw['by']}: {', '.join(choices) or 'none'}", ""))
    for contexts in raw["contexts"].values():
        for place in contexts.values():
            if (supplier := place.partition("/")[0]) not in consumes:
                findings.append(error(name, f"build.contexts names {supplier}", "an input of [consumes]", nearest(supplier, consumes)))
    return Product(**raw)


_KEYS = {
    "summary": str, "image": str, "produces": str, "consumes": dict, "sources": dict, "secrets": dict,
    "parameters": dict, "needs": dict, "build": dict,
}


def load(folder: Path) -> Contract:
    """Reads `folder/stage.toml`. Refused with every fault it has."""
    path = folder / "stage.toml"
    name = f"stages/{folder.name}/stage.toml"
    if not path.is_file():
        raise Refused(error(name, "no such file", "the contract of the stage", "docs/formats.md says what it holds."))
    try:
        raw = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise Refused(error(name, str(fault), "TOML", "Mend that line.")) from fault
    findings: list[Finding] = []
    for key, value in raw.items():
        if key not in _KEYS:
            findings.append(error(name, f"unknown key {key}", "a key of a contract", nearest(key, _KEYS)))
        elif not isinstance(value, _KEYS[key]):
            expected = "a table" if _KEYS[key] is dict else "a string"
            findings.append(error(name, f"{key} = {value!r}", expected, ""))
    for key in ("summary", "image", "produces"):
        if key not in raw:
            findings.append(error(name, f"no {key}", f"{key} = \"...\"", "Add it."))
    if findings:
        raise Refused(findings)
    for owner, kind in [("produces", raw["produces"]), *((f"consumes.{k}", v) for k, v in raw.get("consumes", {}).items())]:
        if not isinstance(kind, str) or kind not in TYPES:
            findings.append(error(name, f"{owner} = {kind!r}", "an artifact type", nearest(str(kind), TYPES)))

    def table(kind: type, where: str, values: Any, **renamed: Any) -> Any:
        allowed = [f for f in kind.__dataclass_fields__]
        if not isinstance(values, dict):
            findings.append(error(name, f"{where} = {values!r}", "a table", ""))
            return kind(**renamed)
        unknown = [key for key in values if key not in allowed]
        for key in unknown:
            findings.append(error(name, f"unknown key {where}.{key}", "a key of this table", nearest(key, allowed)))
        return kind(**{**{k: v for k, v in values.items() if k not in unknown}, **renamed})

    parameters = {}
    for key, values in raw.get("parameters", {}).items():
        where = f"parameters.{key}"
        kind = values.get("type") if isinstance(values, dict) else None
        if kind not in _PARAMETER_TYPES:
            findings.append(error(name, f"{where}.type = {kind!r}", "one of " + ", ".join(_PARAMETER_TYPES), ""))
            continue
        parameter = table(Parameter, where, values, choices=tuple(values.get("choices", ())))
        parameters[key] = parameter
        if not parameter.required:
            try:
                parameter.accept(parameter.default)
            except (TypeError, ValueError):
                findings.append(error(name, f"{where}.default = {parameter.default!r}", parameter.expected, ""))
    sources = {key: table(Source, f"sources.{key}", values) for key, values in raw.get("sources", {}).items()}
    secrets = {key: table(Secret, f"secrets.{key}", values).doc for key, values in raw.get("secrets", {}).items()}
    needs = table(Needs, "needs", raw.get("needs", {}))
    product = _product(name, raw["build"], parameters, raw.get("consumes", {}), findings) if "build" in raw else None
    if findings:
        raise Refused(findings)
    return Contract(
        name=folder.name, folder=folder, summary=raw["summary"], image=raw["image"], produces=raw["produces"],
        consumes=raw.get("consumes", {}), sources=sources, secrets=secrets, parameters=parameters, needs=needs,
        product=product,
    )
