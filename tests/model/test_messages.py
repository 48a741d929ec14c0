"""Messages and tools come into the form that a server gives to the template, or are refused by position."""

import pytest
from talks import SYSTEM, TOOLS, calls, result, says, several, user

from model.families.nemotron_h import chat
from stages.base import make


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    talk = [user("Tea timer, please."), calls("set_timer", {"minutes": 5}), result("ok"), says("Done.")]
    return make.make_tokenizer(
        [{"messages": talk, "tools": TOOLS}], 512, tmp_path_factory.mktemp("tokenizer")
    )


# Results without a call.
@pytest.mark.trap("results-under-the-wrong-call")
@pytest.mark.parametrize(
    "messages, place",
    [
        ([SYSTEM, result("ok", "c1"), user("Timer.")], "message 2 is a tool result"),
        ([user("Timer."), result("ok", "zz"), says("Done.")], "message 2 is a tool result"),
        ([user("Timer."), says("Wait."), result("ok")], "message 3 is a tool result"),
        (
            [user("Go."), several(("stop", {}, "a")), result("ok", "a"), says("Done."), result("ok", "a")],
            "message 5 is a tool result",
        ),
        (
            [user("Go."), several(("stop", {}, "a")), result("ok", "b")],
            "message 3 is the result of a call that message 2 does not make",
        ),
        (
            [user("Go."), several(("stop", {}, "a")), result("ok", "a"), result("ok", "a")],
            "message 2 makes 1 tool calls, but 2 results",
        ),
        (
            [user("Go."), several(("stop", {}, "a"), ("go", {}, "b")), result("ok", "a"), says("Done.")],
            "message 2 makes 2 tool calls, but 1 results",
        ),
        (
            [user("Go."), several(("stop", {}, "a")), says("Done.")],
            "message 2 makes 1 tool calls, but 0 results",
        ),
        (
            [user("Go."), several(("stop", {}, "a")), user("And?")],
            "message 2 makes 1 tool calls, but 0 results",
        ),
        (
            [user("Go."), several(("stop", {}, "a"), ("go", {}, "a")), result("x", "a"), result("y", "b")],
            "two calls of message 2 have the same id",
        ),
        (
            [user("Go."), several(("stop", {}, "a"), ("go", {}, "b")), result("x", "a"), result("y", "a")],
            "two results of message 2 have the same id",
        ),
        (
            [user("Go."), several(("stop", {}, "a")), result("x", {"id": "a"})],
            "an id of the calls of message 2, or of their results, is no text",
        ),
        (
            [user("Go."), several(("stop", {}, "a"), ("go", {}, "b")), result("x", "a"), result("y")],
            "message 4 has no tool_call_id",
        ),
        (
            [user("Go."), several(("stop", {}, "a"), ("go", {}, None)), result("x", "a"), result("y", "b")],
            "not all of its calls have an id",
        ),
        (
            [
                user("Go."),
                several(("stop", {}, None), ("go", {}, None)),
                result("x", name="go"),
                result("y", name="stop"),
            ],
            "message 3 is a result of go",
        ),
    ],
)
def test_case_06_results_and_calls_that_do_not_belong_together_are_refused_by_position(messages, place):
    with pytest.raises(chat.ChatError, match=place):
        chat.normalise(messages)


# Results in another order than the calls.
@pytest.mark.trap("results-under-the-wrong-call")
def test_case_07_results_stand_in_the_order_of_the_calls(tokenizer):
    turn = several(
        ("get_weather", {"city": "Pune"}, "a"),
        ("get_weather", {"city": "Delhi"}, "b"),
        ("get_weather", {"city": "Goa"}, "c"),
    )
    straight = [user("Weather?"), turn, result("31", "a"), result("40", "b"), result("29", "c"), says("So.")]
    mixed = [straight[n] for n in (0, 1, 4, 2, 3, 5)]
    assert chat.normalise(mixed) == chat.normalise(straight) == chat.normalise(chat.normalise(mixed))
    assert chat.render(tokenizer, mixed) == chat.render(tokenizer, straight)
    assert [message["content"] for message in chat.normalise(mixed)[2:5]] == ["31", "40", "29"]


def test_case_07_without_ids_the_order_stands_and_an_id_may_come_again_in_a_later_turn():
    turn = several(("stop", {}, None), ("go", {}, None))
    talk = [
        user("Go."),
        turn,
        result("2"),
        result("1"),
        several(("stop", {}, "c")),
        result("x", "c"),
        several(("stop", {}, "c")),
        result("y", "c"),
        says("So."),
    ]
    assert [message["content"] for message in chat.normalise(talk) if message["role"] == "tool"] == [
        "2",
        "1",
        "x",
        "y",
    ]


# Tools as the server gives them to the template.
BARE = {"name": "stop"}


@pytest.mark.parametrize(
    "given, expected",
    [
        (BARE, {"name": "stop", "description": None, "parameters": None}),
        ({"type": "function", "function": BARE}, {"name": "stop", "description": None, "parameters": None}),
        (
            {"type": "function", "function": {**BARE, "parameters": {}, "description": None}},
            {"name": "stop", "description": None, "parameters": {}},
        ),
        (
            {"type": "function", **BARE, "description": "Stops.", "examples": [1]},
            {"name": "stop", "description": "Stops.", "parameters": None},
        ),
        (
            {"function": {"strict": True, "x": 1, **BARE}, "vendor": 1},
            {"name": "stop", "description": None, "parameters": None, "strict": True},
        ),
        (
            {"function": {"strict": None, **BARE}, "defer_loading": False},
            {"name": "stop", "description": None, "parameters": None, "defer_loading": False},
        ),
    ],
)
def test_case_15_tools_are_what_the_server_makes_of_them(given, expected):
    [made] = chat.served_tools([given])
    assert made == {"type": "function", "function": expected} and list(made["function"]) == list(expected), (
        "the order of keys is rendered"
    )
    assert chat.served_tools([made]) == [made]


@pytest.mark.trap("trained-text-is-not-the-served-text")
def test_case_15_a_tool_without_description_is_trained_as_the_server_writes_it(tokenizer):
    text = chat.render(tokenizer, [user("Hi."), says("Hi.")], [BARE]).text
    assert "<name>stop</name>\n<description>None</description>\n<parameters>\n</parameters>" in text
    assert chat.served_tools(None) == chat.served_tools([]) == []


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"type": "retrieval"}, "tool 1 is not a function"),
        ("stop", "tool 1 is not a function"),
        ({"type": "custom", "name": "stop"}, "tool stop is of type 'custom'"),
        ({**BARE, "parameters": "{}"}, "parameters of tool stop are str"),
        ({**BARE, "description": ["x"]}, "description of tool stop is list"),
        ({**BARE, "strict": "yes"}, "strict of tool stop is str"),
    ],
)
def test_case_15_a_tool_of_another_shape_is_refused_by_name(given, reason):
    with pytest.raises(chat.ChatError, match=reason):
        chat.served_tools([given])


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([], "no messages"),
        (["hi"], "message 1 is not an object"),
        ([{"role": "robot", "content": "x"}], "unknown role 'robot'"),
        ([user("A?"), SYSTEM], "second system prompt"),
        ([user(None)], "content of message 1 is null"),
        ([user(["x"])], "content of message 1 is list"),
        ([user("A?"), says(" ")], "message 2 is an empty assistant turn"),
        ([{**user("A?"), "tool_calls": [{}]}], "message 1 calls a tool, but its role is user"),
        ([{"role": "system", "content": "x-anthropic-billing-header: 1\nA"}], "vLLM removes"),
    ],
)
def test_messages_of_another_shape_are_refused_by_position(messages, reason):
    with pytest.raises(chat.ChatError, match=reason):
        chat.normalise(messages)
