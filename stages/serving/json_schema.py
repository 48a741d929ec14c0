"""JSON Schema in the standard library: the keywords of KEYWORDS, with their meaning in draft 2020-12.

An answer is judged in stage evaluate and again by a server that has started, and the schema itself is checked
on the host before anything runs. A package would have to be the same in all three.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from stages.serving import patterns

DEEPEST = 20  # levels of a schema
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
TEXTS = ("$schema", "title", "description", "default", "examples")  # say something, and ask for nothing


@dataclass(frozen=True)
class Keyword:
    """What a keyword's own value may be, of which JSON types it speaks ("" of all), and whether a value of
    such a type keeps it.
    """

    expected: str
    right: Callable[[Any], bool]
    types: tuple[str, ...]
    kept: Callable[[Any, Any], bool]


def type_of(value: Any) -> str:
    """The JSON type of a value; a number without a fraction is an integer, as in JSON Schema."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "integer" if isinstance(value, int) or value.is_integer() else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _has_type(kind: Any, value: Any) -> bool:
    kinds = kind if isinstance(kind, list) else [kind]
    return type_of(value) in kinds or ("number" in kinds and type_of(value) == "integer")


def _is_type(kind: Any) -> bool:
    kinds = kind if isinstance(kind, list) else [kind]
    return bool(kinds) and all(isinstance(one, str) and one in TYPES for one in kinds)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: to Python, true is 1."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


_NUMBER = ("integer", "number")
_SIMPLE = {
    "type": Keyword(f"one or a list of {', '.join(TYPES)}", _is_type, (), _has_type),
    "enum": Keyword(
        "a list of values",
        lambda given: isinstance(given, list) and bool(given),
        (),
        lambda given, value: any(_same(one, value) for one in given),
    ),
    "const": Keyword("a value", lambda given: True, (), _same),
    "minimum": Keyword("a number", _is_number, _NUMBER, lambda least, value: value >= least),
    "maximum": Keyword("a number", _is_number, _NUMBER, lambda most, value: value <= most),
    "exclusiveMinimum": Keyword("a number", _is_number, _NUMBER, lambda least, value: value > least),
    "exclusiveMaximum": Keyword("a number", _is_number, _NUMBER, lambda most, value: value < most),
    "minLength": Keyword("a count", _is_count, ("string",), lambda least, value: len(value) >= least),
    "maxLength": Keyword("a count", _is_count, ("string",), lambda most, value: len(value) <= most),
    "pattern": Keyword(
        "a regular expression",
        lambda given: isinstance(given, str) and not patterns.fault(given),
        ("string",),
        patterns.found,
    ),
    "minItems": Keyword("a count", _is_count, ("array",), lambda least, value: len(value) >= least),
    "maxItems": Keyword("a count", _is_count, ("array",), lambda most, value: len(value) <= most),
    "required": Keyword(
        "a list of names", _are_names, ("object",), lambda names, value: all(name in value for name in names)
    ),
}
_NESTED = ("properties", "additionalProperties", "items", "anyOf")
KEYWORDS = (*_SIMPLE, *_NESTED)


def faults(schema: Any, where: str = "schema", depth: int = 0) -> Iterator[str]:
    """What is wrong with a schema itself, each with the place in it."""
    if not isinstance(schema, dict):
        yield f"{where} is no map"
        return
    if depth == DEEPEST:
        yield f"{where} is the {depth}th level, one too many"
        return
    for name, given in schema.items():
        place = f"{where}.{name}"
        if name in _SIMPLE:
            if not _SIMPLE[name].right(given):
                yield f"{place} is not {_SIMPLE[name].expected}"
        elif name in ("properties", "anyOf"):
            if not given or not isinstance(given, dict if name == "properties" else list):
                yield f"{place} is not {'a map' if name == 'properties' else 'a list'} of schemas"
                continue
            for key, below in given.items() if isinstance(given, dict) else enumerate(given):
                yield from faults(below, f"{place}.{key}", depth + 1)
        elif name in _NESTED:
            if name == "items" or not isinstance(given, bool):
                yield from faults(given, place, depth + 1)
        elif name not in TEXTS:
            yield f"{place} is not looked at here; {', '.join(KEYWORDS)} are"


def mismatches(schema: dict[str, Any], value: Any, where: str = "") -> Iterator[str]:
    """How `value` breaks a schema that has no faults, with the place in it. Raises patterns.TooSlow."""
    kind, place = type_of(value), where or "the value"
    for name, keyword in _SIMPLE.items():
        speaks = name in schema and (not keyword.types or kind in keyword.types)
        if speaks and not keyword.kept(schema[name], value):
            yield f"{place} breaks {name} {json.dumps(schema[name], ensure_ascii=False)}"
    if "anyOf" in schema and all(any(mismatches(below, value)) for below in schema["anyOf"]):
        yield f"{place} fits none of anyOf"
    if kind == "object":
        listed, other = schema.get("properties", {}), schema.get("additionalProperties", True)
        for key, inner in value.items():
            below = listed.get(key, other)
            if below is False:
                yield f"{place} has {key}, which the schema does not name"
            elif below is not True:
                yield from mismatches(below, inner, f"{where}.{key}".lstrip("."))
    elif kind == "array" and "items" in schema:
        for number, inner in enumerate(value):
            yield from mismatches(schema["items"], inner, f"{where}[{number}]")
