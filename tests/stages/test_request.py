"""Requests to a served model: what is refused before vLLM sees it, and which get the production prompt."""

import json
import re

import pytest

from stages.serving import request
from stages.serving.request import Refusal

PROMPT = {"role": "system", "content": "You are Annie."}
HELLO = {"role": "user", "content": "hello"}
BLANKS = ["", " \n", None, [], [{"type": "text", "text": ""}]]


@pytest.mark.parametrize("blank", BLANKS)
@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_blank_prompt_counts_as_none(role, blank):
    asked = {"messages": [{"role": role, "content": blank}, HELLO], "n": 2}
    assert request.with_prompt(asked, PROMPT["content"]) == {"messages": [PROMPT, HELLO], "n": 2}
    assert asked["messages"][0]["role"] == role, "the client's own request stays as it was"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}, HELLO],
        [HELLO, {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}],
        [{"role": "system", "content": [{"type": "image_url", "image_url": {}}]}, HELLO],
        [{"role": "system", "content": 7}, HELLO],
        [],
        None,
        "hello",
        {"role": "user"},
    ],
)
def test_a_request_with_a_prompt_of_its_own_or_without_messages_stays(messages):
    assert request.with_prompt({"messages": messages}, "x") is None


@pytest.mark.parametrize("messages", [[HELLO], [HELLO, HELLO], ["hello"], [{"role": ["system"]}], [None]])
def test_whatever_else_is_a_list_gets_the_prompt_first(messages):
    assert request.with_prompt({"messages": messages}, PROMPT["content"])["messages"] == [PROMPT, *messages]


def test_what_is_no_request_gets_none():
    assert request.with_prompt(None, "x") is request.with_prompt({}, "x") is None


def checked(**fields):
    return request.checked(json.dumps(fields).encode(), 8, 512, re.compile("(?!)"))


@pytest.mark.parametrize("value", [None, {}, {"json": {"type": "object"}}, {"regex": "\U0001f600"}])
def test_an_object_or_nothing_is_what_vllm_takes(value):
    assert checked(structured_outputs=value, response_format=value)[1] == 1


@pytest.mark.parametrize("name", ["structured_outputs", "response_format"])
@pytest.mark.parametrize(
    ("value", "kind"), [(True, "boolean"), (0, "number"), (0.5, "number"), ("", "string"), ([{}], "array")]
)
def test_what_is_no_object_is_named(name, value, kind):
    with pytest.raises(Refusal, match=f"{name} is a JSON {kind}; an object is expected"):
        checked(**{name: value})


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**400])
def test_a_number_beyond_64_bits_is_named(number):
    with pytest.raises(Refusal, match="top_k is a number beyond 64 bits"):
        checked(top_k=number)


def test_numbers_of_64_bits_and_those_in_schemas_pass():
    schema = {"type": "integer", "maximum": 2**64 - 1}
    checked(top_k=2**63 - 1, seed=-(2**63), temperature=1e300, tools=[{"function": {"parameters": schema}}])


@pytest.mark.parametrize(
    "fields", [{"stop": "\ud800"}, {"prompt": ["\udfff"]}, {"messages": [{"\ud800": 1}]}]
)
def test_half_of_a_surrogate_pair_is_no_text(fields):
    with pytest.raises(Refusal, match="half of a surrogate pair"):
        checked(**fields)
