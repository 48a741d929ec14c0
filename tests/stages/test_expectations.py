"""What a recipe and a question ask of an answer: checks that are off or set, calls, expressions, schemas."""

import itertools
import time
import tomllib

import contracts
import pytest

from stages.evaluate import expectations
from stages.serving import checks, json_schema, patterns

TOOLS = ["set_timer", "search"]


def failed(expect, content=None, *calls):
    tool_calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    answer = {"content": content, "tool_calls": tool_calls, "finish_reason": "stop"}
    return [f.mode for f in checks.failures({"expect": expect}, answer)]


def said(expect):
    return [found for found, _ in expectations.faults(expect, TOOLS)]


# --- checks that are off or set -----------------------------------------------------------------------------

BAD = {
    "emoji": ("Done ✅.", {}),
    "markdown": ("- rice", {}),
    "verbosity": ("word " * 41, {}),
    "follow_up": ("Shall I book it?", {}),
    "tool_leak": ("set_timer(minutes=5)", {}),
    "fabrication": ("Lyon.", {"must_say": ["Paris"]}),
    "wrong_tool": ("Now.", {"tool": {"name": "set_timer", "arguments": {}}}),
    "name_error": ("Ramm.", {"names": ["Ram"]}),
    "think_leak": ("<think>Now.", {}),
}


@pytest.mark.parametrize("mode", checks.MODES)
def test_each_check_can_be_switched_off_alone(mode):
    text, expect = BAD[mode]
    assert failed(expect, text) == failed({**expect, "checks": {mode: True}}, text) == [mode]
    assert failed({**expect, "checks": {mode: False}}, text) == []
    others = dict.fromkeys({*checks.MODES} - {mode}, False)
    assert failed({**expect, "checks": others}, text) == [mode]


def test_an_answer_that_says_nothing_fails_whatever_is_off():
    off = {"checks": dict.fromkeys(checks.MODES, False)}
    call = {"tool": {"name": "set_timer", "arguments": {}}}
    assert failed(off, " ") == failed({**off, **call}, None) == ["verbosity"]
    assert failed(off, None, ("search", "{}")) == []


@pytest.mark.parametrize(
    ("mode", "setting", "right", "wrong"),
    [
        ("verbosity", {"max_words": 80}, "word " * 80, "word " * 81),
        ("follow_up", {"question_marks": 1}, "At which time?", "At six? Or at seven?"),
        ("follow_up", {"question_marks": 1}, "Why? Since it rains. So what?"[5:], "Would you like more."),
        ("follow_up", {"phrases": ["by the way"]}, "Would you like is a phrase.", "By the way, it rains."),
        ("follow_up", {"phrases": []}, "Let me know.", "And you?"),
        ("emoji", {"allowed": ["❤"]}, "A ❤\ufe0f and a ❤.", "A ❤\ufe0f ✅"),
        ("emoji", {"allowed": ["❤\ufe0f", "👍"]}, "A ❤ and 👍.", "👎"),
        ("markdown", {"allowed": ["list", "bold"]}, "- **rice**\n- dal", "1. rice"),
        ("markdown", {"allowed": ["bold"]}, "**Rice** it is, and __dal__.", "An *old* one."),
        ("markdown", {"allowed": ["italic"]}, "An *old* one.", "A **bold** one."),
        ("fabrication", {"must_not_say": ["as an AI"]}, "I am Ram.", "As an ai, I am."),
    ],
)
def test_a_check_can_be_set(mode, setting, right, wrong):
    assert failed({"checks": {mode: setting}}, right) == []
    assert failed({"checks": {mode: setting}}, wrong) == [mode]


def test_a_question_s_own_max_words_counts_before_the_recipe_s():
    assert failed({"max_words": 3, "checks": {"verbosity": {"max_words": 80}}}, "a b c d") == ["verbosity"]
    assert failed({"max_words": 3, "checks": {"verbosity": False}}, "a b c d") == []


def test_every_kind_of_markdown_can_be_allowed_alone():
    samples = {
        "bold": "a **b** c",
        "code": "a `b` c",
        "italic": "a *b* c",
        "heading": "# a",
        "list": "- a",
        "numbered_list": "1. a",
        "link": "[a](b)",
        "table": "| a | b |",
        "quote": "> a",
    }
    for (kind, text), allowed in itertools.product(samples.items(), checks.MARKDOWN):
        expect = {"checks": {"markdown": {"allowed": [allowed]}}}
        assert failed(expect, text) == ([] if kind == allowed else ["markdown"]), (kind, allowed)


def test_the_contract_and_the_questions_have_the_same_settings():
    contract = tomllib.loads((contracts.STAGES / "evaluate/stage.toml").read_text())["parameters"]["checks"]
    fields = {mode: set(described.get("fields", {})) for mode, described in contract["fields"].items()}
    assert fields == {mode: set(settings) for mode, settings in expectations.SETTINGS.items()}
    assert contract["fields"]["markdown"]["fields"]["allowed"]["choices"] == list(checks.MARKDOWN)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([], "expect.checks = []"),
        ({"folow_up": False}, "unknown key folow_up"),
        ({"form": False}, "unknown key form"),
        ({"follow_up": "off"}, "expect.checks.follow_up = 'off'"),
        ({"tool_leak": {}}, "expect.checks.tool_leak = {}"),
        ({"verbosity": {"words": 3}}, "unknown key words"),
        ({"verbosity": {"max_words": 0}}, "expect.checks.verbosity.max_words = 0"),
        ({"verbosity": {"max_words": True}}, "expect.checks.verbosity.max_words = True"),
        ({"follow_up": {"question_marks": -1}}, "expect.checks.follow_up.question_marks = -1"),
        ({"follow_up": {"phrases": [" "]}}, "expect.checks.follow_up.phrases = [' ']"),
        ({"markdown": {"allowed": ["lists"]}}, "expect.checks.markdown.allowed = ['lists']"),
        ({"emoji": {"allowed": "❤"}}, "expect.checks.emoji.allowed = '❤'"),
    ],
)
def test_a_setting_that_is_wrong_is_named(given, found):
    assert said({"checks": given}) == [found]


def test_settings_that_are_right_have_no_fault():
    right = {"follow_up": {"question_marks": 2, "phrases": []}, "emoji": True, "verbosity": {"max_words": 1}}
    assert said({"checks": right}) == []
    assert said({"checks": right, "max_words": 3}) == ["max_words in expect and in expect.checks.verbosity"]


# --- words --------------------------------------------------------------------------------------------------


def test_the_words_of_other_tools_are_answered_with_ours():
    faults = list(expectations.faults({"contains": ["a"], "not_contains": ["b"]}, []))
    assert [expected for _, expected in faults] == [
        "a key of expect, such as must_say",
        "a key of expect, such as must_not_say",
    ]


# --- expressions --------------------------------------------------------------------------------------------


def test_every_expression_has_to_be_found():
    assert failed({"regex": [r"^\d+ km", r"(?i)hampi$"]}, "12 km to Hampi") == []
    assert failed({"regex": [r"^\d+ km", "Udupi"]}, "12 km to Hampi") == [checks.FORM]


@pytest.mark.parametrize("regex", ["(", "[a", "*a", "(?P<1>a)", "(?<=a*)b"])
def test_an_expression_that_is_none_is_refused_before_anything_runs(regex):
    assert len(said({"regex": [regex]})) == 1
    assert len(said({"calls": [{"name": "search", "regex": {"q": regex}}]})) == 1
    assert len(said({"json_schema": {"pattern": regex}})) == 1


@pytest.mark.parametrize("regex", [r"(a+)+$", r"(.*a){25}b", r"(?=(a+)+$)b"])
@pytest.mark.parametrize("place", ["regex", "schema", "call"])
def test_a_catastrophic_expression_ends_and_says_so(regex, place, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    text = "a" * 60 + "b"
    expect, answer = {
        "regex": ({"regex": [regex]}, {"content": text}),
        "schema": ({"json_schema": {"pattern": regex}}, {"content": f'"{text}"'}),
        "call": (
            {"calls": [{"name": "search", "regex": {"q": regex}}]},
            {"tool_calls": [{"function": {"name": "search", "arguments": f'{{"q": "{text}"}}'}}]},
        ),
    }[place]
    began = time.process_time()
    (failure,) = checks.failures({"expect": expect}, answer)
    assert failure.detail == f"the search for {regex} did not end within 0.05 s"
    assert time.process_time() - began < 2


# --- schemas ------------------------------------------------------------------------------------------------

ORDER = {
    "title": "An order",
    "type": "object",
    "required": ["dish", "count"],
    "additionalProperties": False,
    "properties": {
        "dish": {"type": "string", "minLength": 1, "pattern": "^[a-z]+$"},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
        "spice": {"enum": ["mild", "hot", None]},
        "sides": {"type": "array", "maxItems": 2, "items": {"anyOf": [{"const": "rice"}, {"const": 1}]}},
    },
}


@pytest.mark.parametrize(
    "text",
    [
        '{"dish": "dosa", "count": 2}',
        ' {"dish": "dosa", "count": 2.0, "spice": null, "sides": ["rice", 1]}\n',
    ],
)
def test_an_answer_in_the_form_of_its_schema_passes(text):
    assert said({"json_schema": ORDER}) == [] and failed({"json_schema": ORDER}, text) == []


@pytest.mark.parametrize(
    "text",
    [
        "A dosa.",
        "[" * 100_000,
        '```json\n{"dish": "dosa", "count": 2}\n```',
        "[]",
        '{"dish": "dosa"}',
        '{"dish": "dosa", "count": 2, "more": 1}',
        '{"dish": "", "count": 2}',
        '{"dish": "Dosa", "count": 2}',
        '{"dish": "dosa", "count": 0}',
        '{"dish": "dosa", "count": 2.5}',
        '{"dish": "dosa", "count": true}',
        '{"dish": "dosa", "count": 2, "spice": "warm"}',
        '{"dish": "dosa", "count": 2, "sides": ["rice", "rice", "rice"]}',
        '{"dish": "dosa", "count": 2, "sides": [true]}',
    ],
)
def test_an_answer_in_another_form_fails(text):
    assert checks.FORM in failed({"json_schema": ORDER}, text)


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ([], "s is no map"),
        ({"type": "text"}, "s.type is not one or a list of null"),
        ({"type": []}, "s.type is not one or a list of null"),
        ({"minimum": "1"}, "s.minimum is not a number"),
        ({"maxItems": -1}, "s.maxItems is not a count"),
        ({"required": "dish"}, "s.required is not a list of names"),
        ({"properties": {"dish": "string"}}, "s.properties.dish is no map"),
        ({"properties": []}, "s.properties is not a map of schemas"),
        ({"anyOf": {}}, "s.anyOf is not a list of schemas"),
        ({"items": {"$ref": "#/x"}}, "s.items.$ref is not looked at here"),
        ({"additionalProperties": {"enum": []}}, "s.additionalProperties.enum is not a list of values"),
    ],
)
def test_a_schema_that_is_none_is_refused_before_anything_runs(schema, fault):
    (found,) = json_schema.faults(schema, "s")
    assert found.startswith(fault)


def test_a_schema_of_too_many_levels_is_refused():
    schema = {}
    for _ in range(1000):
        schema = {"items": schema}
    assert len(list(json_schema.faults(schema))) == 1


# --- calls --------------------------------------------------------------------------------------------------

TIMER = {"name": "set_timer", "arguments": {"minutes": 5}}
SEARCH = {"name": "search", "regex": {"q": "(?i)hampi"}}
MADE = [("set_timer", '{"minutes": 5}'), ("search", '{"q": "Hampi"}')]


def test_calls_are_expected_in_their_order_unless_any_is_right():
    assert failed({"calls": [TIMER, SEARCH]}, None, *MADE) == []
    assert failed({"calls": [TIMER, SEARCH]}, None, *reversed(MADE)) == ["wrong_tool"]
    assert failed({"calls": [TIMER, SEARCH], "any_order": True}, None, *reversed(MADE)) == []
    for made in ([], MADE[:1], [*MADE, MADE[0]], [MADE[0], MADE[0]]):
        assert failed({"calls": [TIMER, SEARCH], "any_order": True}, None, *made) == ["wrong_tool"]


def test_a_call_that_allows_much_does_not_take_the_one_that_another_needs():
    any_search = {"name": "search", "other_arguments": True}
    made = [("search", '{"q": "Hampi"}'), ("search", '{"q": "Udupi"}')]
    for expected in ([any_search, SEARCH], [SEARCH, any_search]):
        assert failed({"calls": expected, "any_order": True}, None, *made) == []
        assert failed({"calls": expected, "any_order": True}, None, *reversed(made)) == []
    assert failed({"calls": [SEARCH, SEARCH], "any_order": True}, None, *made) == ["wrong_tool"]


@pytest.mark.parametrize(
    ("call", "right", "wrong"),
    [
        ({"arguments": {"q": 1}}, ['{"q": 1}'], ["{}", '{"q": 2}', '{"q": 1, "n": 2}', "[]", '"q"', "{"]),
        ({}, ["{}"], ['{"q": 1}']),
        ({"arguments": {"q": 1}, "other_arguments": True}, ['{"q": 1}', '{"n": 2, "q": 1}'], ['{"n": 1}']),
        ({"regex": {"q": "^H"}}, ['{"q": "Hampi"}'], ['{"q": "at Hampi"}', '{"q": 1}', "{}"]),
        (
            {"arguments": {"n": 1}, "json_schema": {"q": {"type": "integer", "minimum": 5}}},
            ['{"q": 5, "n": 1}'],
            ['{"q": 4, "n": 1}', '{"q": "5", "n": 1}', '{"n": 1}'],
        ),
    ],
)
def test_arguments_are_equal_or_some_or_like_an_expression_or_a_schema(call, right, wrong):
    expect = {"calls": [{"name": "search", **call}]}
    assert said(expect) == []
    assert all(failed(expect, None, ("search", arguments)) == [] for arguments in right)
    assert all(failed(expect, None, ("search", arguments)) == ["wrong_tool"] for arguments in wrong)


@pytest.mark.parametrize(
    ("expect", "found"),
    [
        ({"calls": []}, "expect.calls"),
        ({"calls": TIMER}, "expect.calls"),
        ({"calls": ["set_timer"]}, "expect.calls 1"),
        ({"calls": [TIMER, {"name": "serch"}]}, "expect.calls 2 names serch"),
        ({"calls": [{"name": "search", "argument": {}}]}, "unknown key argument"),
        ({"calls": [{"name": "search", "arguments": "{}"}]}, "expect.calls 1.arguments"),
        ({"calls": [{"name": "search", "regex": {"q": 1}}]}, "expect.calls 1.regex"),
        ({"calls": [{"name": "search", "json_schema": {"q": 1}}]}, "expect.calls 1.json_schema.q is no map"),
        (
            {"calls": [{"name": "search", "arguments": {"q": 1}, "regex": {"q": "a"}}]},
            "expect.calls 1 with q twice",
        ),
        (
            {"calls": [{"name": "search", "other_arguments": "yes"}]},
            "expect.calls 1.other_arguments = 'yes'",
        ),
        ({"calls": [TIMER], "tool": TIMER}, "expect.tool beside calls"),
        ({"calls": [TIMER], "no_tool": True}, "expect.calls beside no_tool"),
        ({"calls": [TIMER], "regex": ["a"]}, "expect.regex beside calls"),
        ({"any_order": True}, "expect.any_order without calls"),
        ({"regex": "a"}, "expect.regex"),
    ],
)
def test_calls_that_no_answer_can_make_are_named(expect, found):
    assert said(expect) == [found]
