"""Calls that the tools of a row do not allow are named, each with what is wrong with it."""

import pytest

from model.families import calls

TIMER = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "description": "Start a timer.",
        "parameters": {
            "type": "object",
            "required": ["minutes"],
            "properties": {
                "minutes": {"type": "integer"},
                "unit": {"enum": ["s", "min"]},
                "loud": {"type": ["boolean", "null"]},
                "share": {"type": "number"},
                "tags": {"type": "array"},
                "at": {"type": "object"},
                "note": {"type": "string"},
            },
        },
    },
}


def outside(name, arguments, *tools):
    turn = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
    }
    return calls.mismatches([{"role": "user", "content": "Go."}, turn], list(tools))


def test_case_08_a_call_of_a_tool_that_the_row_does_not_declare():
    reason = "message 2 calls {}, which the row's tools do not declare"
    assert outside("set_timer", {"minutes": 5}) == [reason.format("set_timer")]
    assert outside("start_timr", {"minutes": 5}, TIMER) == [reason.format("start_timr")]
    assert (
        calls.mismatches([{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Yes."}], None)
        == []
    )


@pytest.mark.parametrize(
    "arguments, reasons",
    [
        ('{"minutes": 5}', []),
        ({"minutes": 5, "unit": "s", "loud": False, "share": 1, "tags": [], "at": {}, "note": ""}, []),
        (
            {"mins": "five"},
            ["argument mins of set_timer is not in its schema", "argument minutes of set_timer is missing"],
        ),
        ({"minutes": "five"}, ["argument minutes of set_timer is string, not integer"]),
        ({"minutes": True}, ["argument minutes of set_timer is boolean, not integer"]),
        ({"minutes": 5.0}, ["argument minutes of set_timer is number, not integer"]),
        ({"minutes": 5, "unit": "h"}, ["argument unit of set_timer is none of its enum"]),
        ({"minutes": 5, "loud": 1}, ["argument loud of set_timer is integer, not boolean or null"]),
        (
            {"minutes": 5, "tags": {}, "at": []},
            [
                "argument tags of set_timer is object, not array",
                "argument at of set_timer is array, not object",
            ],
        ),
    ],
)
def test_case_08_arguments_outside_the_schema(arguments, reasons):
    assert outside("set_timer", arguments, TIMER) == [f"message 2: {reason}" for reason in reasons]


@pytest.mark.parametrize(
    "schema, fits",
    [
        ({"properties": {}, "additionalProperties": True}, True),
        ({"properties": {}, "additionalProperties": {"type": "string"}}, True),
        ({"properties": {}}, False),
        ({"anyOf": []}, True),
        ({"properties": {"x": {"type": "date"}}}, True),
        ({"properties": {"x": True}}, True),
        ({"properties": {"x": {"type": [{"$ref": "#"}]}}}, True),
        (None, False),
        ({}, False),
    ],
)
def test_schemas_of_every_width(schema, fits):
    assert (outside("stop", {"x": 1}, {"name": "stop", "parameters": schema}) == []) == fits
