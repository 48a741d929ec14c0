"""The nine failure modes: answers that must pass, and answers that must fail in one mode and in no other."""

import pytest

from stages.serving import checks

TIMER = {"name": "set_timer", "arguments": {"minutes": 5}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {}}} for name in ("set_timer", "search")
]


def call(name, arguments):
    return {
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
        ],
    }


# expectation, and answers without a fault (a string is spoken text)
CLEAN = [
    # Kannada, signs and arrows are no emoji
    ({}, ["Tokyo.", "ನಮಸ್ಕಾರ ರಾಜೇಶ್, ಇಂದು ಬಿಸಿಲು.", "It is 24°C → warm, ™ and all."]),
    (
        {},
        [
            "That is 2 * 3 * 4.",
            "C# is a language.",
            "A quiet place - and a well-known one.",
            "It is -5 in Leh.",
            "Five > three.",
            "See a_b, 2*3*4.",
        ],
    ),
    (
        {},
        [
            "First, rinse the rice. Second, boil it.",
            "It is number 5) in the queue.",
            "Is it far? No, it is near.",
        ],
    ),
    # a tool with an everyday name
    ({}, ["I used the search for that.", "Say { and } aloud.", "The function f(x) is odd."]),
    ({"max_words": 3}, ["One two three", "well-known two three"]),
    (
        {"unknown": True},
        ["I don't know.", "I don\u2019t know that, Rajesh.", "That is not in my memory.", "I have no idea."],
    ),
    ({"unknown": True}, ["You haven\u2019t told me.", "I can't recall it.", "I do not have that."]),
    # admitting it is enough
    ({"unknown": True, "must_say": [["no memory", "not in memory"]]}, ["I do not remember that."]),
    ({"must_say": ["paris", ["blue", "azure"]]}, ["PARIS is azure today."]),
    ({"must_not_say": ["red scarf"]}, ["It was a scarf, in red."]),
    # `am` is one letter off Ram
    ({"names": ["Rajesh", "Ram"]}, ["Rajesh's van is Ram's.", "I am Ram and you are Rajesh."]),
    (
        {"tool": TIMER},
        [
            call("set_timer", '{"minutes": 5}'),
            {**call("set_timer", '{"minutes": 5}'), "content": "Five minutes."},
        ],
    ),
    ({"no_tool": True}, ["It is five."]),
    ({}, [call("search", '{"query": "x"}')]),  # neither asked for nor forbidden
]
# failure mode, expectation, and answers that have it
FAULTY = [
    (
        "emoji",
        {},
        ["Good night 🌙", "Done ✅.", "It is ❤ red.", "India 🇮🇳 won.", "Press 1️⃣ now.", "Stars ★ shine."],
    ),
    (
        "markdown",
        {},
        ["**Tokyo** it is.", "# Tokyo", "- rice\n- dal", "Fruits:\n\u2022 guava\n\u2022 fig", "1. Rinse it."],
    ),
    ("markdown", {}, ["Say `ls` now.", "See [this](a.org).", "| a | b |", "> so be it", "An *old* one."]),
    (
        "verbosity",
        {"max_words": 3},
        ["one two three four", "", "   ", {"content": None}, {"content": "one", "finish_reason": "length"}],
    ),
    ("verbosity", {}, ["word " * 41]),  # forty unless told
    (
        "follow_up",
        {},
        [
            "Tokyo. And you?",
            "Tokyo. \u201cMore?\u201d",
            "Would you like more.",
            "Let me know.",
            "Anything else, Rajesh?",
        ],
    ),
    (
        "tool_leak",
        {},
        [
            "<tool_call>",
            "<function=set_timer>",
            '{"minutes": 5}',
            "set_timer(minutes=5)",
            "I call set_timer now.",
            '"arguments": none',
        ],
    ),
    ("fabrication", {"unknown": True}, ["Your shoe size is nine.", "I know that well."]),
    ("fabrication", {"must_say": ["Paris", ["blue", "azure"]]}, ["Paris is red.", "Lyon is blue."]),
    ("fabrication", {"must_not_say": ["red scarf"]}, ["A Red Scarf."]),
    (
        "wrong_tool",
        {"tool": TIMER},
        [
            call("set_timer", '{"minutes": 6}'),
            call("set_timer", '{"minutes": "5"}'),
            call("set_timer", "{}"),
            call("search", '{"minutes": 5}'),
            call("set_timer", '{"minutes": 5'),
            call("set_timer", None),
            "Timer set.",
            "",
            {"content": None, "tool_calls": 2 * call("set_timer", '{"minutes": 5}')["tool_calls"]},
        ],
    ),
    ("wrong_tool", {"no_tool": True}, [call("search", '{"query": "x"}')]),
    (
        "name_error",
        {"names": ["Rajesh"]},
        ["Rajeesh is home.", "rajesh is home.", "He is home.", "Rajesh is Rajeesh."],
    ),
    ("name_error", {"names": ["Udupi"]}, ["Udipi is wet."]),
    (
        "think_leak",
        {},
        [
            "<think></think>Tokyo.",
            "So Tokyo.</think>",
            *({"content": "Tokyo.", key: "hmm"} for key in ("reasoning", "reasoning_content")),
        ],
    ),
]


def modes(expect, answer):
    answer = {"content": answer} if isinstance(answer, str) else answer
    return {failure.mode for failure in checks.failures({"expect": expect, "tools": TOOLS}, answer)}


@pytest.mark.parametrize(
    "expect,answer", [(expect, answer) for expect, answers in CLEAN for answer in answers]
)
def test_an_answer_without_a_fault_passes(expect, answer):
    assert modes(expect, answer) == set()


@pytest.mark.parametrize(
    "mode,expect,answer", [(mode, expect, answer) for mode, expect, answers in FAULTY for answer in answers]
)
def test_a_fault_is_found_in_its_own_mode_alone(mode, expect, answer):
    assert modes(expect, answer) == {mode}


def test_the_table_has_every_mode():
    assert {mode for mode, _, _ in FAULTY} == set(checks.MODES) and len(checks.MODES) == 9


def test_one_answer_can_have_many_faults():
    answer = {**call("search", "{}"), "content": "**Rajeesh** 🌙 <think> set_timer(minutes=5) and more?"}
    assert modes({"no_tool": True, "max_words": 3, "names": ["Rajesh"]}, answer) == set(checks.MODES) - {
        "fabrication"
    }


@pytest.mark.parametrize(
    "a,b,edits", [("Rajesh", "Rajesh", 0), ("Rajeesh", "Rajesh", 1), ("Mysore", "Mysuru", 2), ("", "abc", 3)]
)
def test_distance_counts_edits(a, b, edits):
    assert checks.edit_distance(a, b) == checks.edit_distance(b, a) == edits
