"""A JSON Schema of recipes, from the contracts: an editor completes keys with it, shows what each means, and
marks what is wrong before `build.py plan` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forge import artifact_types
from forge.contract import Contract, Source
from forge.contract import load as load_contract
from forge.executors import EXECUTORS
from forge.needs import NEEDS
from forge.parameter import Parameter
from forge.recipe import GPU, LARGEST_SEED

DRAFT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]

_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "map": "object"}
# As YAML 1.1 is read, `1e-4` is a text; a recipe takes it for the number that it is.
_NUMBER = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[-+]?[\d.]+([eE][-+]?\d+)?$"}]}


def of_repository(repo: Path) -> Schema:
    """The schema of the recipes of a repository. Refused if a contract cannot be read."""
    types = artifact_types.load(repo / "stages")
    folders = sorted(path.parent for path in (repo / "stages").glob("*/stage.toml"))
    stages = {folder.name: _stage(load_contract(folder, types)) for folder in folders}
    images = sorted(path.name for path in (repo / "images").iterdir() if path.is_dir())
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    variant = _map({name: {**stage, "required": []} for name, stage in stages.items()})
    top: dict[str, Schema] = {
        "name": {"type": "string", "pattern": "^[A-Za-z0-9._-]+$"},
        "about": {"type": "string"},
        "seed": {"type": "integer", "minimum": 0, "maximum": LARGEST_SEED},
        "gpu": {"enum": list(GPU)},
        "executor": {"enum": list(EXECUTORS)},
        "images": _map(dict.fromkeys(images, texts)),
        "secrets": texts,
        "stages": _map(stages),
        "variants": {"type": "object", "additionalProperties": variant},
    }
    return {"$schema": DRAFT, "title": "A recipe", **_map(top), "required": ["name", "stages"]}


def _map(properties: dict[str, Schema]) -> Schema:
    """A map of these keys alone; YAML has null for one without content."""
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}


def _stage(contract: Contract) -> Schema:
    sources = {name: _source(source) for name, source in contract.sources.items()}
    needs = {
        name: {"type": _TYPES[kind], **({} if kind == "bool" else {"minimum": least})}
        for name, (kind, least) in NEEDS.items()
    }
    parameters = {name: _parameter(parameter) for name, parameter in contract.parameters.items()}
    others = {
        "inputs": _map({name: {"type": "string"} for name in contract.consumes}),
        "sources": _map(sources),
        "needs": _map(needs),
    }
    required = [name for name, parameter in contract.parameters.items() if parameter.required]
    return {**_map({**parameters, **others}), "description": contract.summary, "required": required}


def _source(source: Source) -> Schema:
    paths = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    return {"anyOf": [{"type": "string"}, paths], "description": source.doc}


def _parameter(parameter: Parameter) -> Schema:
    described = {"description": parameter.doc} if parameter.doc else {}
    if not parameter.required:
        described["default"] = parameter.default
    value = _value(parameter)
    if parameter.also:
        value = {"anyOf": [value, {"enum": list(parameter.also)}]}
    return {**value, **described}


def _value(parameter: Parameter) -> Schema:
    if parameter.type.startswith("list["):
        item = Parameter(parameter.type[5:-1], choices=parameter.choices, matches=parameter.matches)
        return {"type": "array", "items": _value(item)}
    if parameter.choices:
        return {"enum": list(parameter.choices)}
    if parameter.type == "map":
        return _entries(parameter)
    limits: Schema = {
        "minimum": parameter.min,
        "maximum": parameter.max,
        "exclusiveMinimum": parameter.above,
        "multipleOf": parameter.multiple_of,
        "pattern": f"^({parameter.matches})$" if parameter.matches else None,
    }
    kind: Schema = _NUMBER if parameter.type == "float" else {"type": _TYPES[parameter.type]}
    return {**kind, **{name: limit for name, limit in limits.items() if limit is not None}}


def _entries(parameter: Parameter) -> Schema:
    fields = _map({name: _parameter(inner) for name, inner in parameter.fields.items()})
    if not parameter.keys:
        return fields if parameter.fields else {"type": "object"}
    kinds = [_parameter(parameter.each)] if parameter.each else []
    kinds += [fields] if parameter.fields else []
    return _map(dict.fromkeys(parameter.keys, {"anyOf": kinds} if kinds else {}))
