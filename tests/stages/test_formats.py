"""Every format and key: read into canonical messages, refused by name, or counted as not used
(docs/formats.md has the same table).
"""

import json
import re
from pathlib import Path

import pytest

from model.families.messages import ChatError, normalise, served_tools
from stages.conversations import formats
from stages.conversations.formats import canonical

REPO = Path(__file__).resolve().parents[2]
USER, ANSWER = {"role": "user", "content": "Tea."}, {"role": "assistant", "content": "Yes."}
TIMER = {"type": "function", "function": {"name": "set_timer", "arguments": {"minutes": 5}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [TIMER]}


def said(*turns, **more):
    return {"messages": list(turns), **more}


def test_canonical_messages_come_out_as_they_went_in():
    turns = [
        {"role": "system", "content": "S"},
        USER | {"train": False},
        {
            "role": "assistant",
            "content": "On it.",
            "tool_calls": [{"id": "c", **TIMER}],
            "reasoning_content": "hm",
        },
        {"role": "tool", "content": "ok", "tool_call_id": "c", "name": "set_timer"},
        ANSWER,
    ]
    result = canonical(
        said(*turns, tools=[{"type": "function", "function": {"name": "set_timer"}}], id=3, category="c")
    )
    assert (result.format, result.messages, result.unused) == ("messages", turns, ())
    assert result.tools == [{"type": "function", "function": {"name": "set_timer"}}]


READ = {
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Tea."}, {"from": "gpt", "value": "Yes."}]},
        [USER, ANSWER],
    ),
    "ShareGPT under conversation, with its system": (
        {
            "conversation": [{"from": "user", "value": "Tea."}, {"from": "assistant", "value": "Yes."}],
            "system": "S",
        },
        [{"role": "system", "content": "S"}, USER, ANSWER],
    ),
    "ShareGPT's calls": (
        {
            "conversations": [
                {"from": "human", "value": "Tea."},
                {"from": "function_call", "value": '{"name": "set_timer", "arguments": {"minutes": 5}}'},
                {"from": "observation", "value": "ok"},
                {"from": "gpt", "value": "Yes."},
            ],
            "tools": "",
        },
        [USER, CALLED, {"role": "tool", "content": "ok"}, ANSWER],
    ),
    "ShareGPT's weights": (
        {
            "conversations": [
                {"from": "human", "value": "Tea.", "weight": 0},
                {"from": "gpt", "value": "Yes.", "weight": 1},
            ]
        },
        [USER | {"train": False}, ANSWER],
    ),
    "conversations with roles": ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
    "messages as text": ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
    "Alpaca": ({"instruction": "Tea.", "input": "", "output": "Yes."}, [USER, ANSWER]),
    "Alpaca with all its keys": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "S", "history": [["Tea.", "Yes."]]},
        [
            {"role": "system", "content": "S"},
            USER,
            ANSWER,
            {"role": "user", "content": "Add.\n1 2"},
            {"role": "assistant", "content": "3"},
        ],
    ),
    "parts of text": (
        said(
            {
                "role": "user",
                "content": [{"type": "text", "text": "Tea"}, {"type": "input_text", "text": "now"}, "please"],
            },
            ANSWER,
        ),
        [{"role": "user", "content": "Tea\nnow\nplease"}, ANSWER],
    ),
    "developer": (
        said({"role": "developer", "content": "S"}, USER, ANSWER),
        [{"role": "system", "content": "S"}, USER, ANSWER],
    ),
    "the row's own system": (
        said(USER, ANSWER, system="S"),
        [{"role": "system", "content": "S"}, USER, ANSWER],
    ),
    "nulls that a table added": (
        said(
            {**USER, "tool_calls": None, "name": None, "weight": None, "function_call": None},
            {**ANSWER, "tool_calls": [], "refusal": None, "audio": None},
        ),
        [USER, ANSWER],
    ),
    "function_call without text": (
        said(
            USER,
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "set_timer", "arguments": '{"minutes": 5}'},
            },
            {"role": "function", "name": "set_timer", "content": "ok"},
            ANSWER,
        ),
        [USER, CALLED, {"role": "tool", "content": "ok", "name": "set_timer"}, ANSWER],
    ),
    "function_call beside text": (
        said(
            USER,
            {
                "role": "assistant",
                "content": "On it.",
                "function_call": {"name": "set_timer", "arguments": {"minutes": 5}},
            },
        ),
        [USER, {**CALLED, "content": "On it."}],
    ),
    "a call without its wrapping": (
        said(
            USER,
            {
                "role": "assistant",
                "tool_calls": [{"id": "c", "name": "set_timer", "arguments": '{"minutes": 5}', "index": 0}],
            },
        ),
        [USER, {**CALLED, "tool_calls": [{"id": "c", **TIMER}]}],
    ),
    "reasoning": (said(USER, {**ANSWER, "reasoning": "hm"}), [USER, {**ANSWER, "reasoning_content": "hm"}]),
    "the same reasoning twice": (
        said(USER, {**ANSWER, "reasoning": "hm", "reasoning_content": "hm"}),
        [USER, {**ANSWER, "reasoning_content": "hm"}],
    ),
    "empty reasoning": (said(USER, {**ANSWER, "reasoning_content": ""}), [USER, ANSWER]),
    "train: true": (said(USER, {**ANSWER, "train": True, "weight": 1.0}), [USER, ANSWER]),
    "train: false and weight 0": (
        said(USER, {**ANSWER, "train": False, "weight": 0}),
        [USER, {**ANSWER, "train": False}],
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_a_row_of_each_format_becomes_canonical(kind):
    row, messages = READ[kind]
    before = json.dumps(row)
    assert canonical(row).messages == messages and not canonical(row).unused
    assert json.dumps(row) == before, "the row itself is not changed"


@pytest.mark.parametrize("arguments", ["", "  ", "{}", "null", None, {}, ...])
def test_arguments_of_none_are_an_empty_object_as_for_the_server(arguments):
    function = {"name": "get_time"} if arguments is ... else {"name": "get_time", "arguments": arguments}
    for turn in ({"tool_calls": [{"function": function}]}, {"function_call": function}):
        [call] = canonical(said(USER, {"role": "assistant", "content": "", **turn})).messages[1]["tool_calls"]
        assert call["function"] == {"name": "get_time", "arguments": {}}


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    "key, tools, expected",
    [
        ("tools", [TOOL], [TOOL]),
        ("tools", json.dumps([TOOL]), [TOOL]),
        ("tools", [json.dumps(TOOL)], [TOOL]),
        ("functions", [{"name": "f"}], [{"name": "f"}]),
        ("functions", json.dumps([{"name": "f"}]), [{"name": "f"}]),
        ("tools", [], None),
        ("tools", "", None),
        ("tools", "[]", None),
        ("tools", None, None),
    ],
)
def test_tools_in_all_their_forms(key, tools, expected):
    assert canonical(said(USER, ANSWER, **{key: tools})).tools == expected


def assistant(**more):
    return said(USER, {**ANSWER, **more})


REFUSED = {
    "weight 0.5": (assistant(weight=0.5), "weight of message 2 is 0.5"),
    "weight 2": (assistant(weight=2), "weight of message 2 is 2"),
    "weight false": (assistant(weight=False), "weight of message 2 is False"),
    "weight as text": (assistant(weight="0"), "weight of message 2 is '0'"),
    "train as text": (assistant(train="no"), "train of message 2 is 'no'"),
    "train as a number": (assistant(train=0), "train of message 2 is 0"),
    "flags that differ": (assistant(train=True, weight=0), "weight and train of message 2 contradict"),
    "a user's turn to train": (
        said({**USER, "train": True}, ANSWER),
        "message 1 of role user is flagged to be trained",
    ),
    "another flag": (assistant(loss=False), "loss of message 2 may be a flag"),
    "a flag on the row": (said(USER, ANSWER, weight=0), "weight stands on the row"),
    "an image": (
        said(
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "See"},
                    {"type": "image_url", "image_url": {"url": "x"}},
                ],
            },
            ANSWER,
        ),
        "part of type 'image_url'",
    ),
    "a refusal as a part": (
        assistant(content=[{"type": "refusal", "refusal": "No."}]),
        "part of type 'refusal'",
    ),
    "a thought as a part": (
        assistant(content=[{"type": "thinking", "thinking": "hm"}]),
        "part of type 'thinking'",
    ),
    "a refusal": (assistant(refusal="No."), "refusal of message 2"),
    "audio": (assistant(audio={"id": "a"}), "audio of message 2"),
    "images of the row": (said(USER, ANSWER, images=["a.png"]), "images is not text"),
    "content as an object": (assistant(content={"text": "x"}), "content of message 2 is an object"),
    "a custom tool": (
        assistant(tool_calls=[{"type": "custom", "custom": {"name": "x"}, "name": "x"}]),
        "type 'custom'",
    ),
    "a call without a name": (
        assistant(tool_calls=[{"function": {"arguments": "{}"}}]),
        "without a function name",
    ),
    "function_call: auto": (assistant(function_call="auto"), "function_call is text that is not JSON"),
    "both forms of a call": (
        assistant(tool_calls=[TIMER], function_call=TIMER["function"]),
        "both tool_calls and function_call",
    ),
    "a user's call": (said({**USER, "tool_calls": [TIMER]}, ANSWER), "message 1 of role user calls a tool"),
    "arguments that are a list": (
        assistant(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]),
        "arguments of f are a list",
    ),
    "arguments encoded twice": (
        assistant(tool_calls=[{"function": {"name": "f", "arguments": '"{}"'}}]),
        "arguments of f are text",
    ),
    "arguments with a key twice": (
        assistant(tool_calls=[{"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}]),
        "the key 'a' stands twice",
    ),
    "arguments with NaN": (
        assistant(tool_calls=[{"function": {"name": "f", "arguments": '{"a": NaN}'}}]),
        "NaN",
    ),
    "two reasonings": (assistant(reasoning="a", reasoning_content="b"), "two different texts of reasoning"),
    "reasoning as a list": (assistant(reasoning=[{"text": "a"}]), "reasoning of message 2 is not text"),
    "a user's reasoning": (said({**USER, "reasoning": "a"}, ANSWER), "message 1 of role user has reasoning"),
    "another role": (said({"role": "bot", "content": "x"}, ANSWER), "unknown role 'bot'"),
    "a role that is a list": (said({"role": ["user"], "content": "x"}, ANSWER), "unknown role ['user']"),
    "another of ShareGPT": (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "unknown role 'narrator'",
    ),
    "ShareGPT's call as text": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "timer"}]},
        "not JSON",
    ),
    "two systems": (
        said({"role": "system", "content": "A"}, USER, ANSWER, system="B"),
        "two different system prompts",
    ),
    "system and developer": (
        said({"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, ANSWER),
        "message 2 is a second system prompt",
    ),
    "a null user": (said({"role": "user", "content": None}, ANSWER), "content of message 1 is null"),
    "both forms of tools": (
        said(USER, ANSWER, tools=[TOOL], functions=[{"name": "g"}]),
        "both tools and functions",
    ),
    "tools that are an object": (said(USER, ANSWER, tools={"f": {}}), "tools is an object"),
    "tools that are text": (said(USER, ANSWER, tools="f(x)"), "tools is text that is not JSON"),
    "a tool without a name": (
        said(USER, ANSWER, tools=[{"type": "function", "function": {}}]),
        "tool 1 is not a function with a name",
    ),
    "Alpaca without an answer": ({"instruction": "x", "output": ""}, "message 2 is an empty assistant turn"),
    "Alpaca's output as a list": ({"instruction": "x", "output": ["y"]}, "output is a list"),
    "preferences": (
        {"prompt": "x", "chosen": "a", "rejected": "b"},
        "no format that is read: preference pairs (chosen, rejected)",
    ),
    "prompt and completion": (
        {"prompt": "x", "completion": "a"},
        "no format that is read: a prompt and its completion",
    ),
    "others": ({"dialog": [], "n": 1}, "no format that is read: the keys are 'dialog', 'n'"),
    "an empty object": ({}, "the keys are none at all"),
    "no messages": ({"messages": []}, "messages is empty"),
    "messages that are one": ({"messages": USER}, "messages is an object"),
    "a message that is text": ({"messages": ["Hi", "Hello"]}, "message 1 is text"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_represented_is_refused_by_name(kind):
    row, reason = REFUSED[kind]
    with pytest.raises(ChatError, match=re.escape(reason)):
        conversation = canonical(row)
        normalise(conversation.messages), served_tools(conversation.tools)


def test_other_keys_are_dropped_and_counted():
    row = said(
        {**USER, "name": "Rajesh", "created": 1},
        {**ANSWER, "annotations": []},
        source="web",
        parallel_tool_calls=False,
        id="7",
    )
    assert canonical(row).messages == [USER, ANSWER]
    assert canonical(row).unused == (
        "source",
        "parallel_tool_calls",
        "messages[].name",
        "messages[].created",
        "messages[].annotations",
    )


def test_the_three_shapes_that_an_error_shows_are_read():
    assert {canonical(json.loads(shape)).format for shape in formats.SHAPES} == {
        "messages",
        "ShareGPT",
        "Alpaca",
    }


def test_the_table_of_the_docs_names_every_role_and_key_that_the_code_knows():
    section = (
        (REPO / "docs" / "formats.md")
        .read_text()
        .split("### Conversations: what is read")[1]
        .split("\n### ")[0]
    )
    known = set(re.findall(r"`([^`]+)`", section))
    names = {
        *formats.ROLE,
        *formats.CALLS,
        *formats.HISTORY,
        *formats.MEDIA,
        *formats.FLAGS,
        *formats.REASONING,
        *formats.SILENT,
    }
    assert names <= known, names - known
