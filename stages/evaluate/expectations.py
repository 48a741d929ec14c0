"""Checks what a question expects of its answer, `expect`, before any question is asked (docs/formats.md,
Questions).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Any

from stages.serving import checks, json_schema, patterns

EXPECT = (
    "tool",
    "calls",
    "any_order",
    "no_tool",
    "max_words",
    "must_say",
    "must_not_say",
    "unknown",
    "names",
    "regex",
    "json_schema",
    "checks",
)
CALL = ("name", "arguments", "regex", "json_schema", "other_arguments")
ELSEWHERE = {"contains": "must_say", "not_contains": "must_not_say"}  # as other tools call them
# expectation -> the check that judges it
JUDGE = {
    "tool": "wrong_tool",
    "calls": "wrong_tool",
    "no_tool": "wrong_tool",
    "max_words": "verbosity",
    "must_say": "fabrication",
    "must_not_say": "fabrication",
    "unknown": "fabrication",
    "names": "name_error",
}
Faults = Iterator[tuple[str, str]]  # found, expected


def faults(expect: Any, tools: list[str]) -> Faults:
    """Everything that is wrong with `expect` of a question that has `tools`."""
    if not isinstance(expect, dict):
        yield f"expect as a JSON {type(expect).__name__}", f"a map with some of {', '.join(EXPECT)}"
        return
    yield from unknown_keys(expect, EXPECT, "expect")
    yield from _call_faults(expect, tools)
    for name in ("no_tool", "unknown", "any_order"):
        if not isinstance(expect.get(name, True), bool):
            yield f"expect.{name} = {expect[name]!r}", "true or false"
    if not _is_count(expect.get("max_words", 1), 1):
        yield f"expect.max_words = {expect['max_words']!r}", "a whole number, at least 1"
    for name in ("must_not_say", "names", "regex"):
        if name in expect and not are_texts(expect[name]):
            yield f"expect.{name}", "a list of texts that are not empty"
    must_say = expect.get("must_say", [])
    if not isinstance(must_say, list) or not all(is_text(part) or are_texts(part) for part in must_say):
        yield (
            "expect.must_say",
            "a list of texts, or of lists of texts of which one has to be said; none of them empty",
        )
    if are_texts(expect.get("regex")):
        yield from _regex_faults("expect.regex", expect["regex"])
    if "json_schema" in expect:
        yield from _schema_faults("expect.json_schema", expect["json_schema"])
    if "checks" in expect:
        yield from _check_faults(expect)


def unknown_keys(values: dict[str, Any], known: tuple[str, ...], owner: str) -> Faults:
    """Keys of `values` that are not `known`, each with the nearest one that is."""
    for key in values:
        if key not in known:
            close = (
                [ELSEWHERE[key]]
                if ELSEWHERE.get(key) in known
                else difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            )
            yield (
                f"unknown key {key}",
                f"a key of {owner}, such as {close[0]}" if close else f"a key of {owner}: {', '.join(known)}",
            )


def is_text(value: Any) -> bool:
    """Whether `value` is a text that is not empty."""
    return isinstance(value, str) and bool(value.strip())


def are_texts(value: Any) -> bool:
    """Whether `value` is a list of texts; neither it nor they are empty."""
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _call_faults(expect: dict[str, Any], tools: list[str]) -> Faults:
    given = [name for name in ("tool", "calls", "no_tool") if expect.get(name) not in (None, False)]
    if len(given) > 1:
        yield f"expect.{given[0]} beside {given[1]}", "one of the two"
    if "any_order" in expect and "calls" not in expect:
        yield "expect.any_order without calls", "calls, whose order it speaks of"
    for name in ("regex", "json_schema"):
        if name in expect and ("tool" in expect or "calls" in expect):
            yield f"expect.{name} beside {given[0]}", "one of the two: a text is expected, or calls"
    if "tool" in expect:
        tool = expect["tool"]
        if (
            not isinstance(tool, dict)
            or set(tool) != {"name", "arguments"}
            or not is_text(tool["name"])
            or not isinstance(tool["arguments"], dict)
        ):
            yield "expect.tool", '{"name": text, "arguments": map}'
        else:
            yield from _name_faults("expect.tool", tool["name"], tools)
    if "calls" in expect:
        calls = expect["calls"]
        if not isinstance(calls, list) or not calls:
            yield "expect.calls", "a list of calls; for none, no_tool: true"
            return
        for number, call in enumerate(calls, 1):
            yield from _one_call_faults(f"expect.calls {number}", call, tools)


def _one_call_faults(place: str, call: Any, tools: list[str]) -> Faults:
    if not isinstance(call, dict) or not is_text(call.get("name")):
        yield place, f'{{"name": text}}, with some of {", ".join(CALL[1:])}'
        return
    yield from unknown_keys(call, CALL, "a call")
    yield from _name_faults(place, call["name"], tools)
    if not isinstance(call.get("other_arguments", True), bool):
        yield f"{place}.other_arguments = {call['other_arguments']!r}", "true or false"
    maps = {name: call.get(name, {}) for name in ("arguments", "regex", "json_schema")}
    for name, value in maps.items():
        if not isinstance(value, dict):
            yield f"{place}.{name}", "a map of arguments"
            return
    named = [argument for value in maps.values() for argument in value]
    for argument in sorted({argument for argument in named if named.count(argument) > 1}):
        yield f"{place} with {argument} twice", "each argument in one of arguments, regex and json_schema"
    if not all(map(is_text, maps["regex"].values())):
        yield f"{place}.regex", "a map of arguments and regular expressions"
        return
    yield from _regex_faults(f"{place}.regex", list(maps["regex"].values()))
    for argument, schema in maps["json_schema"].items():
        yield from _schema_faults(f"{place}.json_schema.{argument}", schema)


def _name_faults(place: str, name: str, tools: list[str]) -> Faults:
    if name not in tools:
        yield f"{place} names {name}", f"a tool of this question: {', '.join(tools) or 'it has none'}"


def _regex_faults(place: str, regexes: list[str]) -> Faults:
    for regex in regexes:
        if fault := patterns.fault(regex):
            yield f"{place} with {regex} ({fault})", "a regular expression as Python has them"


def _schema_faults(place: str, schema: Any) -> Faults:
    for fault in json_schema.faults(schema, place):
        yield fault, "a JSON Schema of the keywords in docs/formats.md, Questions"


# --- the checks ---------------------------------------------------------------------------------------------

# check -> what can be set of it, and what such a value has to be; as [parameters.checks] of the contract
SETTINGS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    **{mode: {} for mode in checks.MODES},
    "emoji": {"allowed": (are_texts, "a list of emoji")},
    "markdown": {
        "allowed": (
            lambda value: are_texts(value) and set(value) <= set(checks.MARKDOWN),
            f"a list of {', '.join(checks.MARKDOWN)}",
        )
    },
    "verbosity": {"max_words": (lambda value: _is_count(value, 1), "a whole number, at least 1")},
    "follow_up": {
        "question_marks": (lambda value: _is_count(value, 0), "a whole number, at least 0"),
        "phrases": (lambda value: value == [] or are_texts(value), "a list of phrases"),
    },
    "fabrication": {"must_not_say": (are_texts, "a list of texts that are not empty")},
}


def _check_faults(expect: dict[str, Any]) -> Faults:
    given = expect["checks"]
    if not isinstance(given, dict):
        yield f"expect.checks = {given!r}", f"a map with some of {', '.join(SETTINGS)}"
        return
    yield from unknown_keys(given, tuple(SETTINGS), "expect.checks")
    for mode in (mode for mode in given if mode in SETTINGS):
        place, value = f"expect.checks.{mode}", given[mode]
        if not isinstance(value, (bool, dict)) or (isinstance(value, dict) and not SETTINGS[mode]):
            settings = f", or a map with {', '.join(SETTINGS[mode])}" if SETTINGS[mode] else ""
            yield f"{place} = {value!r}", f"true or false{settings}"
        elif isinstance(value, dict):
            yield from unknown_keys(value, tuple(SETTINGS[mode]), place)
            for name in (name for name in value if name in SETTINGS[mode]):
                right, expected = SETTINGS[mode][name]
                if not right(value[name]):
                    yield f"{place}.{name} = {value[name]!r}", expected
    if "max_words" in expect and isinstance(given.get("verbosity"), dict):
        yield "max_words in expect and in expect.checks.verbosity", "one of the two"
