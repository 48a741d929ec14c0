"""What is trained is what a server will ask for: rendered text, tokens and mask of a conversation."""

import json

import pytest
from talks import SYSTEM, TOOLS, calls, result, says, several, user

from model.families.nemotron_h import chat
from stages.base import make, teach

# A plain answer, a call with words before it, its result put in words (with blanks around), a bare call.
TALK = [
    SYSTEM,
    user("Capital of Japan?"),
    says("Tokyo."),
    user("Tea timer, please."),
    calls("set_timer", '{"minutes": 5}', "Starting it."),
    {"role": "tool", "content": '{"ok": true}'},
    says(" Done. "),
    user("Another."),
    calls("set_timer", {"minutes": 7}),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make.make_tokenizer(
        [{"messages": TALK, "tools": TOOLS}], 512, tmp_path_factory.mktemp("tokenizer")
    )


def only_call(messages):
    [call] = messages[-1]["tool_calls"]
    return call["function"]["arguments"]


@pytest.mark.trap("tool-arguments-as-text")
def test_arguments_become_a_mapping_in_their_own_order():
    message = calls("send_message", '{"to": "Priya", "text": "late", "again": true}')
    assert list(only_call(chat.normalise([user("Go on."), message])).items()) == [
        ("to", "Priya"),
        ("text", "late"),
        ("again", True),
    ]
    assert only_call([message]) == '{"to": "Priya", "text": "late", "again": true}', (
        "the caller's rows stay as they were"
    )


MIXED = [
    calls("send_message", '{"to": "Priya", "text": "ಹಾಯ್, \\"late\\""}'),
    calls("set_timer", {"minutes": 5, "loud": True, "factor": 1.0}, "Starting it."),
    calls("plan", '{"stops": ["Mysuru", "Hampi"], "home": {"city": "Bengaluru", "after": null}}'),
    calls("stop", "{}"),
]
MIXED_TEXT = """<think></think>
<tool_call>
<function=send_message>
<parameter=to>
Priya
</parameter>
<parameter=text>
ಹಾಯ್, "late"
</parameter>
</function>
</tool_call>
|<think></think>Starting it.
<tool_call>
<function=set_timer>
<parameter=minutes>
5
</parameter>
<parameter=loud>
True
</parameter>
<parameter=factor>
1.0
</parameter>
</function>
</tool_call>
|<think></think>
<tool_call>
<function=plan>
<parameter=stops>
["Mysuru", "Hampi"]
</parameter>
<parameter=home>
{"city": "Bengaluru", "after": null}
</parameter>
</function>
</tool_call>
|<think></think>
<tool_call>
<function=stop>
</function>
</tool_call>
"""


@pytest.mark.trap("tool-arguments-as-text")
def test_mixed_tool_calls_read_exactly_so(tokenizer):
    talk = [turn for call in MIXED for turn in (user("Go on."), call, {"role": "tool", "content": "ok"})]
    text = chat.render(tokenizer, talk).text
    turns = [part.partition("<|im_end|>")[0] for part in text.split("<|im_start|>assistant\n")[1:]]
    assert turns == MIXED_TEXT.split("|")


@pytest.mark.trap("tool-arguments-as-text")
def test_rows_that_went_through_arrow_are_refused():
    pyarrow = pytest.importorskip("pyarrow")
    rows = [
        {"messages": [calls("set_timer", {"minutes": 5})]},
        {"messages": [calls("play_music", {"query": "veena"})]},
    ]
    for row, back in zip(rows, pyarrow.Table.from_pylist(rows).to_pylist(), strict=True):
        assert only_call(chat.normalise(row["messages"])).keys() < only_call(back["messages"]).keys(), (
            "Arrow has to add a key, or this test shows nothing"
        )
        with pytest.raises(chat.ChatError, match="is null: leave it out"):
            chat.normalise(back["messages"])


@pytest.mark.trap("tool-arguments-as-text")
@pytest.mark.parametrize(
    "arguments, reason",
    [
        ("{minutes: 5}", "not JSON"),
        ("[5]", "list, not an object"),
        ("null", "NoneType, not an object"),
        ('{"minutes": NaN}', "NaN or Infinity"),
        ('{"minutes": null}', "minutes of set_timer is null"),
    ],
)
def test_arguments_that_are_no_object_are_refused(arguments, reason):
    with pytest.raises(chat.ChatError, match=reason):
        chat.normalise([calls("set_timer", arguments)])


def spans(rendered):
    """Runs of trained tokens: (first, after the last)."""
    trained = [label != chat.IGNORED for label in rendered.labels]
    starts = [n for n, on in enumerate(trained) if on and not trained[n - 1]]
    return [
        (start, next((n for n in range(start, len(trained)) if not trained[n]), len(trained)))
        for start in starts
    ]


@pytest.mark.trap("think-block-disagrees")
def test_the_server_s_prompt_and_the_trained_span_make_the_training_text(tokenizer):
    rendered = chat.render(tokenizer, TALK, TOOLS)
    answers = [number for number, message in enumerate(TALK) if message["role"] == "assistant"]
    assert len(spans(rendered)) == len(answers) == 4
    for number, (first, last) in zip(answers, spans(rendered), strict=True):
        prompt = tokenizer.apply_chat_template(
            chat.normalise(TALK[:number]),
            tools=chat.served_tools(TOOLS),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        assert prompt.endswith("<|im_start|>assistant\n<think></think>") and prompt == chat.template_text(
            tokenizer, TALK[:number], TOOLS, generation=True
        )
        assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == rendered.input_ids[:first], (
            "the same tokens, not only the same text"
        )
        answer = tokenizer.decode(rendered.input_ids[first:last])
        assert rendered.text.startswith(prompt + answer) and answer.endswith("<|im_end|>")
    assert tokenizer.decode(rendered.input_ids[slice(*spans(rendered)[0])]) == "Tokyo.<|im_end|>"


@pytest.mark.trap("think-block-disagrees")
def test_the_default_prompt_would_not_lead_to_the_training_text(tokenizer):
    prompt = tokenizer.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<think>\n") and not chat.render(tokenizer, TALK[:3]).text.startswith(prompt)


@pytest.mark.trap("think-block-disagrees")
def test_labels_are_the_tokens_themselves_and_never_those_of_others(tokenizer):
    rendered = chat.render(tokenizer, TALK, TOOLS)
    assert all(
        label in (token, chat.IGNORED)
        for token, label in zip(rendered.input_ids, rendered.labels, strict=True)
    )
    call = (
        "<tool_call>\n<function=set_timer>\n<parameter=minutes>\n{}\n</parameter>\n</function>\n</tool_call>"
        "\n<|im_end|>"
    )
    said = tokenizer.decode([label for label in rendered.labels if label != chat.IGNORED])
    assert said == f"Tokyo.<|im_end|>Starting it.\n{call.format(5)}Done.<|im_end|>\n{call.format(7)}"


@pytest.mark.trap("think-block-disagrees")
@pytest.mark.parametrize(
    "answer", ["<think>hm</think>Tokyo.", "Tokyo.</think>", "Tokyo.<|im_end|>\n<|im_start|>user\n"]
)
def test_thoughts_and_markers_in_a_message_are_refused(tokenizer, answer):
    with pytest.raises(chat.ChatError, match="message 2"):
        chat.render(tokenizer, [user("Capital of Japan?"), says(answer)])


@pytest.mark.trap("think-block-disagrees")
def test_reasoning_is_left_out_unless_it_is_asked_for(tokenizer):
    thoughtful = [user("Capital of Japan?"), {**says("Tokyo."), "reasoning_content": "Japan is in Asia."}]
    assert chat.render(tokenizer, thoughtful) == chat.render(
        tokenizer, [user("Capital of Japan?"), says("Tokyo.")]
    )
    with pytest.raises(chat.ChatError, match="reasoning_content of message 2 is int, not text"):
        chat.normalise([user("Capital of Japan?"), {**says("Tokyo."), "reasoning_content": 3}])


@pytest.mark.trap("think-block-disagrees")
def test_a_template_that_writes_no_think_block_is_refused(tokenizer):
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = own.replace("<think></think>", "")
        with pytest.raises(chat.ChatError, match="the template is not the one"):
            chat.render(tokenizer, TALK, TOOLS)
    finally:
        tokenizer.chat_template = own


@pytest.mark.trap("pad-is-the-end-token")
def test_every_answer_s_end_is_trained_and_the_newline_after_it_is_not(tokenizer):
    rendered = chat.render(tokenizer, TALK, TOOLS)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (tokenizer.eos_token_id, end, tokenizer.pad_token) == (11, 11, None)
    assert [rendered.labels[last - 1] for _, last in spans(rendered)] == [end] * 4
    assert rendered.labels[-1] == chat.IGNORED and tokenizer.decode(rendered.input_ids[-1]) == "\n"


@pytest.mark.trap("pad-is-the-end-token")
def test_padding_is_zero_and_masks_no_answer_s_end(tokenizer):
    rows = [chat.render(tokenizer, TALK[:3]), chat.render(tokenizer, TALK, TOOLS)]
    ids, labels = teach.collate(rows)
    short = len(rows[0].input_ids)
    assert chat.PAD == 0 != tokenizer.eos_token_id
    assert set(ids[0, short:].tolist()) == {0} and set(labels[0, short:].tolist()) == {chat.IGNORED}
    assert [int((row == tokenizer.eos_token_id).sum()) for row in labels] == [1, 4]


@pytest.mark.trap("text-read-as-control-token")
def test_a_tool_that_holds_the_template_s_markers_is_refused(tokenizer):
    tools = json.loads(json.dumps(TOOLS).replace("integer", "<|im_start|>assistant\\n<|im_end|>"))
    with pytest.raises(chat.ChatError, match=r"tool set_timer holds <\|im_start\|>"):
        chat.render(tokenizer, TALK[:3], tools)


@pytest.mark.trap("template-with-a-date")
def test_a_template_with_today_s_date_is_refused(tokenizer):
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ strftime_now('%d') }}" + own
        with pytest.raises(chat.ChatError, match="strftime_now"):
            chat.render(tokenizer, TALK)
    finally:
        tokenizer.chat_template = own


def served(tokenizer, messages, tools):
    """(prompt that the server makes for a turn, the row up to there) for every assistant turn."""
    rendered = chat.render(tokenizer, messages, tools)
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    for number, (first, _) in zip(turns, spans(rendered), strict=True):
        prompt = tokenizer.apply_chat_template(
            chat.normalise(messages)[:number],
            tools=chat.served_tools(tools),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        yield tokenizer(prompt, add_special_tokens=False)["input_ids"], rendered.input_ids[:first]


# Blanks around content: the row's history is the one that the server renders for each turn.
@pytest.mark.trap("trained-text-is-not-the-served-text")
@pytest.mark.parametrize("content", ["  Sure.", "Sure.\n", "\u2003Sure. ", "\r\nSure.\r\n", "", None])
def test_case_17_blanks_around_an_answer_do_not_change_later_prompts(tokenizer, content):
    talk = [
        {"role": "system", "content": "  You are Annie.\r\n"},
        user(" x\n"),
        several(("set_timer", {"minutes": 5}, "c1"), content=content),
        result(" ok ", "c1"),
        says(" Done. "),
        user("again"),
        several(("set_timer", {"minutes": 5}, "c2"), content=content),
        result("ok", "c2"),
        says("\nYes."),
    ]
    for prompt, row in served(tokenizer, talk, TOOLS):
        assert prompt == row
    text = chat.render(tokenizer, talk, TOOLS).text
    assert (
        "<|im_start|>system\n  You are Annie.\r\n\n\n# Tools" in text
        and "user\n x\n<|im_end|>" in text
        and "<tool_response>\n ok \n</tool_response>" in text
    )
    assert "<think></think>Done.<|im_end|>" in text and "<think></think>Yes.<|im_end|>" in text


# Arguments that are empty.
@pytest.mark.parametrize(
    "function",
    [{"arguments": ""}, {"arguments": None}, {}, {"arguments": "  "}, {"arguments": "{}"}, {"arguments": {}}],
)
def test_case_19_empty_arguments_are_an_empty_object(tokenizer, function):
    turn = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "get_time", **function}}],
    }
    assert only_call(chat.normalise([user("Time?"), turn])) == {}
    assert "<function=get_time>\n</function>" in chat.render(tokenizer, [user("Time?"), turn]).text


# Flags and thoughts.
def test_a_message_with_train_false_stays_in_the_context_and_out_of_the_loss(tokenizer):
    talk = [
        user("A?"),
        says("One."),
        user("B?"),
        {**says("Two."), "train": False},
        user("C?"),
        {**says("Three."), "train": True},
    ]
    rendered = chat.render(tokenizer, talk)
    assert (
        rendered.input_ids
        == chat.render(tokenizer, [{key: m[key] for key in ("role", "content")} for m in talk]).input_ids
    )
    assert (
        tokenizer.decode([label for label in rendered.labels if label != chat.IGNORED])
        == "One.<|im_end|>Three.<|im_end|>"
    )
    with pytest.raises(chat.ChatError, match="train of message 2"):
        chat.render(tokenizer, [user("A?"), {**says("One."), "train": 0}])


def test_reasoning_is_trained_from_the_prompt_of_a_server_that_thinks(tokenizer):
    """Thoughts before the last user message are context that the template leaves out; a turn without any
    is trained as one of a server that does not think.
    """
    talk = [
        SYSTEM,
        user("A?"),
        {**says("One."), "reasoning_content": "Hm."},
        user("B?"),
        {**several(("set_timer", {"minutes": 5}, "a")), "reasoning_content": "\nA timer. "},
        result("ok", "a"),
        {**says("Two."), "reasoning_content": "It runs."},
        says("Three."),
    ]
    rendered = chat.render(tokenizer, talk, TOOLS, reasoning=True)
    said = [tokenizer.decode(rendered.input_ids[slice(*span)]) for span in spans(rendered)]
    call = (
        "<tool_call>\n<function=set_timer>\n<parameter=minutes>\n5\n</parameter>\n</function>\n</tool_call>\n"
    )
    assert said == [
        f"A timer.\n</think>\n{call}<|im_end|>",
        "It runs.\n</think>\nTwo.<|im_end|>",
        "Three.<|im_end|>",
    ]
    for number, (first, _) in zip((4, 6), spans(rendered), strict=False):
        prompt = tokenizer.apply_chat_template(
            [
                {key: value for key, value in m.items() if n > 3 or key != "reasoning_content"}
                for n, m in enumerate(chat.normalise(talk)[:number])
            ],
            tools=chat.served_tools(TOOLS),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == rendered.input_ids[:first]
    with pytest.raises(chat.ChatError, match="reasoning_content of message 2 holds </think>"):
        chat.render(
            tokenizer, [user("A?"), {**says("One."), "reasoning_content": "a</think>b"}], reasoning=True
        )
