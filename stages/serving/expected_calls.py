"""The calls of an answer beside those that a question expects (docs/formats.md, Questions)."""

from __future__ import annotations

import json
from typing import Any

from stages.serving import json_schema, patterns

Made = tuple[str, dict[str, Any]]  # name and arguments


def fault(expect: dict[str, Any], calls: list[dict[str, Any]]) -> str:
    """How `calls`, as in an OpenAI message, differ from what is expected; "" if they do not. Raises
    patterns.TooSlow.
    """
    made: list[Made] = []
    for call in calls:
        try:
            arguments = json.loads(call["function"]["arguments"])
        except (TypeError, ValueError, RecursionError):
            return f"arguments of {call['function']['name']} are not JSON"
        made.append((call["function"]["name"], arguments))
    expected = [expect["tool"]] if "tool" in expect else expect.get("calls")
    if expected:
        kept = _in_any_order if expect.get("any_order") else _in_order
        if not kept(expected, made):
            between = " and " if expect.get("any_order") else ", then "
            return f"called {made or 'nothing'}, wanted {between.join(map(_described, expected))}"
    elif made and expect.get("no_tool"):
        return f"called {made}, wanted none"
    return ""


def _in_order(expected: list[dict[str, Any]], made: list[Made]) -> bool:
    return len(expected) == len(made) and all(map(_fits, expected, made))


def _in_any_order(expected: list[dict[str, Any]], made: list[Made]) -> bool:
    """Whether every expected call has a call of its own (Kuhn's matching): one that allows much must not take
    the only call that another one allows.
    """
    taken_by: dict[int, int] = {}

    def place(number: int, tried: set[int]) -> bool:
        for position, call in enumerate(made):
            if position not in tried and _fits(expected[number], call):
                tried.add(position)
                if position not in taken_by or place(taken_by[position], tried):
                    taken_by[position] = number
                    return True
        return False

    return len(expected) == len(made) and all(place(number, set()) for number in range(len(expected)))


def _fits(expected: dict[str, Any], call: Made) -> bool:
    name, arguments = call
    if name != expected["name"] or not isinstance(arguments, dict):
        return False
    equal, regex, schemas = (expected.get(key, {}) for key in ("arguments", "regex", "json_schema"))
    named = {*equal, *regex, *schemas}
    if not named <= set(arguments) or (set(arguments) - named and not expected.get("other_arguments")):
        return False
    return (
        all(arguments[key] == value for key, value in equal.items())
        and all(
            isinstance(arguments[key], str) and patterns.found(regex[key], arguments[key]) for key in regex
        )
        and not any(any(json_schema.mismatches(schemas[key], arguments[key])) for key in schemas)
    )


def _described(expected: dict[str, Any]) -> str:
    """An expected call in words."""
    parts = [f"{expected['name']} {expected.get('arguments', {})}"]
    parts += [f"{key} like {pattern}" for key, pattern in expected.get("regex", {}).items()]
    parts += [f"{key} of the schema {schema}" for key, schema in expected.get("json_schema", {}).items()]
    parts += ["and any other arguments"] * bool(expected.get("other_arguments"))
    return ", ".join(parts)
