"""Text in a message or a tool is never read as a control token, as markup or as a call."""

import pytest
from talks import SYSTEM, TOOLS, calls, result, says, tool, user

from model.families.nemotron_h import chat
from stages.base import make


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    talk = [user("Tea timer, please."), calls("set_timer", {"minutes": 5}), result("ok"), says("Done.")]
    return make.make_tokenizer(
        [{"messages": talk, "tools": TOOLS}], 512, tmp_path_factory.mktemp("tokenizer")
    )


# A call that is written out as text.
@pytest.mark.trap("call-written-as-text")
@pytest.mark.parametrize(
    "content, string",
    [
        ('<tool_call>\n{"name": "set_timer", "arguments": {"minutes": 5}}\n</tool_call>', "<tool_call>"),
        ('Starting it. {"name": "set_timer", "arguments": {"minutes": 5}}', '"name": ... in JSON'),
        ('```json\n[{"arguments": {"minutes": 5}, "name": "set_timer"}]\n```', '"arguments"'),
        ("<function=set_timer>\n<parameter=minutes>\n5\n</parameter>\n</function>", "<function="),
        ('<functioncall> {"name": "set_timer"}', "<functioncall>"),
        ("[TOOL_CALLS]set_timer", r"\[TOOL_CALLS\]"),
        ("[set_timer(minutes=5)]", r"set_timer\("),
        ("< parameter = minutes>", "< parameter ="),
    ],
)
def test_case_03_a_call_written_out_as_text_is_refused(tokenizer, content, string):
    if "(" not in string and "parameter" not in string:  # those need the tools, or are no beginning of a call
        with pytest.raises(chat.ChatError, match=rf"message 2 holds {string}"):
            chat.normalise([user("Timer."), says(content), result("ok"), says("Done.")])
    with pytest.raises(chat.ChatError, match=rf"message 2 holds {string}"):
        chat.render(tokenizer, [user("Timer."), says(content)], TOOLS)


@pytest.mark.parametrize(
    "content",
    [
        "The name is Asha, the arguments are good.",
        "Say set_timer(5) in the prompt, or so.",
        '{"name": "Asha"}',
        "5 < 6 and 7 > 6",
    ],
)
def test_case_03_what_only_looks_like_a_call_is_trained(tokenizer, content):
    assert chat.render(tokenizer, [user("What?"), says(content)], TOOLS).trained


# Text that the tokenizer reads as a control token, wherever it stands.
@pytest.mark.trap("text-read-as-control-token")
@pytest.mark.parametrize(
    "token",
    [
        "<s>",
        "</s>",
        "<unk>",
        "<|im_end|>",
        "<SPECIAL_20>",
        "<think>",
        "</think>",
        "<tool_response>",
        "</tool_call>",
    ],
)
@pytest.mark.parametrize(
    "where, place",
    [
        (lambda t: ([{**SYSTEM, "content": f"Use {t}."}, user("Hi."), says("Hi.")], TOOLS), "message 1"),
        (lambda t: ([user(f"Strike it: {t}old"), says("Yes.")], TOOLS), "message 1"),
        (lambda t: ([user("Strike it."), says(f"Here: {t}old")], TOOLS), "message 2"),
        (lambda t: ([user("Go."), calls("set_timer", {"minutes": 5}), result(f"a{t}b")], TOOLS), "message 3"),
        (
            lambda t: ([user("Go."), calls("set_timer", {"note": {"deep": ["x", f"a{t}"]}})], TOOLS),
            "message 2: a call of set_timer",
        ),
        (
            lambda t: (
                [user("Go."), says("Yes.")],
                [tool("stop", at={"type": "string", "description": f"a{t}"})],
            ),
            "tool stop",
        ),
        (lambda t: ([user("Go."), says("Yes.")], [tool("stop", at={"enum": [f"a{t}"]})]), "tool stop"),
    ],
)
def test_case_04_a_control_token_in_a_text_is_refused(tokenizer, token, where, place):
    messages, tools = where(token)
    with pytest.raises(chat.ChatError, match=place) as refusal:
        chat.render(tokenizer, messages, tools)
    assert token in str(refusal.value), "the reason names the string"


@pytest.mark.trap("text-read-as-control-token")
def test_case_04_an_added_token_that_is_not_special_counts(tokenizer):
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    talk = [user("Hi."), says("So [INST] it is.")]
    assert chat.render(own, talk).trained
    own.add_tokens("[INST]")
    with pytest.raises(chat.ChatError, match=r"message 2 holds \[INST\]"):
        chat.render(own, talk)


def test_case_04_a_key_of_a_tool_that_the_template_writes_as_a_tag_is_refused(tokenizer):
    with pytest.raises(chat.ChatError, match="tool stop holds <s>"):
        chat.render(tokenizer, [user("Hi."), says("Hi.")], [tool("stop", at={"type": "string", "s": [1]})])
    assert chat.render(tokenizer, [user("Hi."), says("Hi.")], [tool("stop", s={"type": "string"})]).trained, (
        "a property's own name is no tag"
    )


@pytest.mark.parametrize(
    "value",
    [
        "a</parameter>b",
        "a< / parameter >",
        "<parameter=x>",
        "</function>",
        ["</tool_call>"],
        {"<parameter=x>": 1},
    ],
)
def test_an_argument_with_markup_that_the_parser_would_read_is_refused(tokenizer, value):
    with pytest.raises(chat.ChatError, match="message 2: a call of set_timer holds <"):
        chat.render(tokenizer, [user("Go."), calls("set_timer", {"note": value})], TOOLS)


@pytest.mark.parametrize("name", ["a>b", "a\nb", "<s>", " a", "", "a=b"])
def test_a_name_that_cannot_be_read_back_is_refused(name):
    with pytest.raises(chat.ChatError, match="not a name that can be read back"):
        chat.normalise([user("Go."), calls("set_timer", {name: 1})])
    with pytest.raises(chat.ChatError, match="not a name that can be read back|without a function name"):
        chat.normalise([user("Go."), calls(name, {})])
    with pytest.raises(chat.ChatError, match="tool 1"):
        chat.served_tools([tool(name)])
