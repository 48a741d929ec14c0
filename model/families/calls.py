"""Finds calls that do not fit the tools of their row. Stage data counts them, or refuses them if asked to."""

from __future__ import annotations

from typing import Any

from model.families.messages import normalise, served_tools

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def mismatches(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[str]:
    """A short reason for everything in the calls of `messages` that `tools` do not allow; empty if all fit.

    It checks that the tool is declared, and at its schema's top level `properties` (unless
    additionalProperties allows more), `required`, and each property's `type` and `enum`. Deeper levels,
    anyOf, $ref and the like are not checked. Reasons never contain values.
    """
    declared = {tool["function"]["name"]: tool["function"] for tool in served_tools(tools)}
    reasons = []
    for position, message in enumerate(normalise(messages), 1):
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if name not in declared:
                reasons.append(f"message {position} calls {name}, which the row's tools do not declare")
            else:
                reasons += [
                    f"message {position}: {reason}"
                    for reason in _schema_mismatches(declared[name]["parameters"], name, arguments)
                ]
    return reasons


def _schema_mismatches(schema: dict[str, Any] | None, name: str, arguments: dict[str, Any]) -> list[str]:
    schema = schema or {}
    properties = schema.get("properties")
    listed = properties if isinstance(properties, dict) else {}
    reasons = []
    additional = schema.get("additionalProperties", False)
    if (isinstance(properties, dict) or not schema) and not (
        additional is True or isinstance(additional, dict)
    ):
        reasons += [
            f"argument {key} of {name} is not in its schema" for key in arguments if key not in listed
        ]
    required = schema.get("required")
    for key in required if isinstance(required, list) else ():
        if key not in arguments:
            reasons.append(f"argument {key} of {name} is missing")
    for key, value in arguments.items():
        property_schema = listed.get(key)
        if not isinstance(property_schema, dict):
            continue
        if (expected := property_schema.get("type")) is not None and not _has_type(value, expected):
            types = expected if isinstance(expected, list) else [expected]
            reasons.append(
                f"argument {key} of {name} is {_type_name(value)}, not {' or '.join(map(str, types))}"
            )
        elif isinstance(property_schema.get("enum"), list) and value not in property_schema["enum"]:
            reasons.append(f"argument {key} of {name} is none of its enum")
    return reasons


def _has_type(value: Any, expected: Any) -> bool:
    """Whether `value` has a JSON Schema type, or one of a list. An unknown type allows everything.

    1.0 is no integer: the template writes it as 1.0, and vLLM's parser does not read that back as an integer.
    """
    kinds = expected if isinstance(expected, list) else [expected]
    if not all(isinstance(kind, str) and kind in _TYPES for kind in kinds):
        return True
    if isinstance(value, bool):
        return "boolean" in kinds
    return any(isinstance(value, _TYPES[kind]) for kind in kinds)


def _type_name(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    return next(kind for kind, types in _TYPES.items() if isinstance(value, types))
