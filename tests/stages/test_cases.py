"""Inputs that people have, from file to trained tokens: each is read right, or refused with the reason."""

import gzip
import io
import json

import contracts
import pytest

from stages import dataset, job
from stages.base import make
from stages.data import prepare
from stages.job import Job, StageError

PROMPT = "You are Annie."
SCHEMA = {"type": "object", "properties": {"minutes": {"type": "integer"}}, "required": ["minutes"]}
TIMER = {"name": "set_timer", "description": "Start a timer", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": TIMER}]


def talk(question="hi", answer="Hello.", prompt=PROMPT, **more):
    system = [] if prompt is None else [{"role": "system", "content": prompt}]
    return {
        "messages": [
            *system,
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        **more,
    }


def called(arguments='{"minutes": 5}', tools=TOOLS, **more):
    row = talk(tools=tools, **more)
    call = {"id": "c1", "type": "function", "function": {"name": "set_timer", "arguments": arguments}}
    row["messages"][-1:] = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "ok"},
        {"role": "assistant", "content": "Done."},
    ]
    return row


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make.make_tokenizer(
        [talk(f"Is it {word}?") for word in ("late", "warm", "far")] + [called({"minutes": 5})], 512, folder
    )
    (folder / "config.json").write_text('{"model_type": "nemotron_h", "vocab_size": 512}')
    return folder


class Line:
    """Runs stage data in a folder with the contract's defaults, and keeps what it said."""

    def __init__(self, base, folder, patch):
        self.base, self.folder, self.patch = base, folder, patch
        (folder / "scratch").mkdir()
        self.talks = folder / "talks"
        self.talks.mkdir()

    def put(self, name, *rows):
        raw = (
            rows[0]
            if isinstance(rows[0], bytes)
            else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        )
        (self.talks / name).parent.mkdir(parents=True, exist_ok=True)
        (self.talks / name).write_bytes(raw)
        return self.talks / name

    def run(self, *sources, prompt=PROMPT.encode(), file=None, **params):
        """stats.json; the rows are then in `train` and `held_out`, and the messages of the warnings in
        `warnings`.
        """
        (self.folder / "prompt.txt").write_bytes(prompt)
        paths = {"conversations": list(sources) or [self.talks], "prompt": [self.folder / "prompt.txt"]}
        if file is not None:  # the production tools
            (self.folder / "tools.json").write_bytes(
                file if isinstance(file, bytes) else json.dumps(file).encode()
            )
            paths["tools"] = [self.folder / "tools.json"]
        self.output = self.folder / f"output{len(list(self.folder.glob('output*')))}"
        self.output.mkdir()
        events = io.StringIO()
        self.patch.setattr(job, "_events", events)
        try:
            prepare.run(
                Job(
                    "data",
                    contracts.defaults("data", **params),
                    {"base": self.base},
                    self.output,
                    self.folder / "scratch",
                    0,
                    paths,
                )
            )
        finally:
            self.warnings = [
                e["message"]
                for e in map(json.loads, events.getvalue().splitlines())
                if e["event"] == "warning"
            ]
        self.train, self.held_out = (
            [row for _, row in dataset.read(self.output / f"{name}.jsonl")] for name in ("train", "eval")
        )
        return json.loads((self.output / "stats.json").read_text())

    def trained(self):
        """What is trained of each row, as text."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.base)
        return [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in self.train]


@pytest.fixture
def line(base, tmp_path, monkeypatch):
    return Line(base, tmp_path, monkeypatch)


def test_a_call_of_the_older_form_beside_text_is_trained_as_a_call(line):
    row = talk("timer", functions=[TIMER])
    row["messages"][-1] = {
        "role": "assistant",
        "content": "Setting it.",
        "function_call": {"name": "set_timer", "arguments": '{"minutes": 5}'},
    }
    line.put("a.jsonl", row)
    line.run(eval_share=0.0)
    [trained] = line.trained()
    assert (
        trained.startswith("Setting it.")
        and "<function=set_timer>" in trained
        and line.train[0]["tools"] == TOOLS
    )


def test_a_folder_of_mixed_files_is_read_whole_and_what_is_not_read_is_named(line):
    for number, name in enumerate(("a.jsonl", "b.json", "c.ndjson", "d.JSONL", "e.jsonl.gz")):
        rows = [talk(f"question {number}")]
        line.put(
            name,
            (
                json.dumps(rows).encode()
                if name == "b.json"
                else (
                    gzip.compress(json.dumps(rows[0]).encode())
                    if name.endswith("gz")
                    else json.dumps(rows[0]).encode()
                )
            ),
        )
    line.put("notes.txt", b"remember\n")
    line.put(".git/config.json", b"{}")
    told = line.run(eval_share=0.0)
    assert told["train"] == 5 and told["left_out"] == {
        "talks/.git/": "is hidden",
        "talks/notes.txt": "is text",
    }
    assert [
        w
        for w in line.warnings
        if w.startswith("2 files are not read: ") and "talks/notes.txt" in w and "talks/.git/" in w
    ]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "prompt",
    [
        b"You are Annie.\nBe brief.",
        b"\xef\xbb\xbfYou are Annie.\r\nBe brief.\r\n",
        "You are Annie.\r\nBe brief.".encode("utf-16"),
    ],
    ids=["LF", "mark and CRLF", "UTF-16"],
)
def test_prompt_and_rows_are_compared_alike_and_trained_exactly(line, ends, prompt):
    line.put("a.jsonl", talk(prompt=f"You are Annie.{ends}Be brief.{ends}"))
    line.run(prompt=prompt, eval_share=0.0)
    assert (
        line.train[0]["messages"][0]["content"] + "\n"
        == (line.output / "prompt.txt").read_bytes().decode()
        == "You are Annie.\nBe brief.\n"
    )


@pytest.mark.trap("stale-prompt")
def test_a_prompt_that_looks_alike_is_refused_with_the_character(line):
    line.put("a.jsonl", talk(prompt="You are\u00a0Annie."))
    with pytest.raises(
        StageError,
        match=(
            r"first difference at line 1, column 8: U\+0020 SPACE in production, U\+00A0 NO-BREAK SPACE in"
            r" the row"
        ),
    ):
        line.run(eval_share=0.0)


@pytest.mark.parametrize(
    "prompt, reason",
    [(b"", "is empty"), (b"\xef\xbb\xbf \r\n", "is empty"), (b"caf\xe9", "is no utf-8 text")],
)
def test_a_prompt_file_that_is_none_is_called_so(line, prompt, reason):
    line.put("a.jsonl", talk())
    with pytest.raises(StageError, match=f"prompt.txt {reason}"):
        line.run(prompt=prompt)


def test_rows_without_a_prompt_are_refused_or_given_it(line):
    rows = [
        talk("one"),
        talk("two", prompt=None),
        talk("three", prompt=" \n"),
        {"conversations": [{"from": "human", "value": "four"}, {"from": "gpt", "value": "4"}]},
        {"instruction": "five", "output": "5"},
    ]
    path = line.put("a.jsonl", *rows)
    with pytest.raises(
        StageError, match=r"4 of 5 rows have no system prompt, first a.jsonl:2.*missing_prompt: insert"
    ):
        line.run(path)
    told = line.run(path, missing_prompt="insert", eval_share=0.0)
    assert {row["messages"][0]["content"] for row in line.train} == {PROMPT} and told["prompts_inserted"] == 4
    assert told["formats"] == {"Alpaca": 1, "ShareGPT": 1, "messages": 3} and told["other_prompts"] == 0


@pytest.mark.parametrize(
    "tools",
    [TOOLS, {"tools": TOOLS}, [TIMER], {"tools": [TIMER]}],
    ids=["a list", "an object", "bare", "an object of bare"],
)
def test_a_tools_file_reaches_serving_in_the_one_form_that_servers_take(line, tools):
    line.put("a.jsonl", called())
    told = line.run(file=tools, eval_share=0.0)
    assert json.loads((line.output / "tools.json").read_text()) == TOOLS and told["other_tools"] == {}


@pytest.mark.parametrize(
    "tools, reason",
    [
        (b"set_timer(minutes)", "is not JSON"),
        (b"", "is empty"),
        ({"set_timer": SCHEMA}, "an object with the keys 'set_timer'"),
        ([*TOOLS, TIMER], "several tools called set_timer"),
        ([{"type": "function", "function": {"description": "x"}}], "tool 1 is not a function with a name"),
        (["set_timer"], "tool 1 is not a function with a name"),
        ([{"type": "function", "function": {"name": ""}}], "the name of tool 1"),
        (TOOLS[0], "an object with the keys 'type', 'function'"),
        (b"\xff\xfe[", "no utf-16-le text"),
    ],
)
def test_a_tools_file_of_another_shape_is_refused_with_the_shape(line, tools, reason):
    line.put("a.jsonl", called())
    with pytest.raises(StageError) as refused:
        line.run(file=tools)
    assert "tools.json" in refused.value.found and reason in refused.value.found and refused.value.remedy


def test_tools_of_a_row_are_in_the_servers_form(line):
    line.put("a.jsonl", called(tools=[TIMER]), called(tools=json.dumps(TOOLS), question="again"))
    line.run(eval_share=0.0)
    assert [row["tools"] for row in line.train] == [TOOLS, TOOLS]


def test_rows_without_tools_are_refused_given_them_or_allowed(line):
    path = line.put("a.jsonl", called(), talk("two"), talk("three", tools=[]))
    with pytest.raises(
        StageError, match=r"2 of 3 rows have no tools, first a.jsonl:2; production sends 1 .*tools: insert"
    ):
        line.run(path, file=TOOLS)
    told = line.run(path, file=TOOLS, tools="insert", eval_share=0.0, max_tokens=4096)
    assert told["tools_inserted"] == 2 and all(
        row["tools"] == TOOLS and "set_timer" in row["text"] for row in line.train
    )
    told = line.run(path, file=TOOLS, tools="allow", eval_share=0.0)
    assert told["without_tools"] == 2 and [bool(row["tools"]) for row in line.train] == [True, False, False]


def test_tools_that_production_does_not_have_are_counted_and_a_part_of_them_is_right(line):
    other = {"type": "function", "function": {**TIMER, "description": "Another"}}
    path = line.put(
        "a.jsonl",
        called(),
        called(tools=[other], question="two"),
        called(
            tools=[*TOOLS, {"type": "function", "function": {"name": "fly", "parameters": {}}}],
            question="three",
        ),
    )
    told = line.run(
        path,
        file=[*TOOLS, {"type": "function", "function": {"name": "get_time"}}],
        eval_share=0.0,
        max_tokens=4096,
    )
    assert told["other_tools"] == {"set_timer (another definition)": 1, "fly (unknown)": 1}
    wanted = "set_timer (another definition) in 1 rows, fly (unknown) in 1 rows"
    assert sum(f"tools that are not production's: {wanted}" in warning for warning in line.warnings) == 1


@pytest.mark.parametrize(
    "raw",
    [
        gzip.compress(json.dumps(talk()).encode()),
        json.dumps(talk()).encode("utf-16"),
        json.dumps(talk()).encode("utf-16-be"),
        json.dumps([talk()], indent=1).encode(),
    ],
    ids=["gzip", "UTF-16", "UTF-16 BE, no mark", "an array"],
)
def test_a_file_of_another_kind_under_the_usual_name_is_read(line, raw):
    line.run(line.put("in.jsonl", raw), eval_share=0.0)
    assert line.trained() == ["Hello.<|im_end|>"]


@pytest.mark.parametrize("arguments", ["", None, "null", {}, "{}"])
def test_empty_arguments_are_trained_as_a_call_without_parameters(line, arguments):
    line.run(
        line.put(
            "in.jsonl",
            called(
                arguments,
                tools=[
                    {
                        "type": "function",
                        "function": {
                            "name": "set_timer",
                            "description": "x",
                            "parameters": {"type": "object", "properties": {}},
                        },
                    }
                ],
            ),
        ),
        eval_share=0.0,
    )
    assert "<function=set_timer>\n</function>" in line.trained()[0]


@pytest.mark.trap("held-out-rows-are-trained")
def test_a_folders_own_test_split_is_held_out_and_never_trained(line):
    line.put("train.jsonl", talk("a"), talk("both"), talk("c"))
    line.put("test.jsonl", talk("both"), talk("d"))
    told = line.run()
    assert [row["messages"][1]["content"] for row in line.train] == ["a", "c"] and [
        row["messages"][1]["content"] for row in line.held_out
    ] == ["both", "d"]
    assert (
        told["splits"] == {"talks/test.jsonl": "test"}
        and told["overlap"] == 1
        and told["held_out_categories"] == {"test": 2}
    )
    assert [w for w in line.warnings if "held out, by their names: talks/test.jsonl (test)" in w]
    line.run(line.talks / "test.jsonl", eval_share=0.0)
    assert len(line.train) == 2, "a file that the recipe names is what the recipe says"


def test_a_row_with_line_separators_is_one_row(line):
    text = "note:\u2028buy\u2029milk\u0085now"
    line.run(line.put("in.jsonl", json.dumps(talk(text), ensure_ascii=False).encode()), eval_share=0.0)
    assert line.train[0]["messages"][1]["content"] == text


def test_five_conversations_in_each_of_ten_files_can_be_trained(line):
    for number in range(10):
        line.put(f"c{number}.jsonl", *(talk(f"question {number} {n}") for n in range(5)))
    told = line.run()
    assert (told["train"], told["eval"]) == (45, 5) and set(told["held_out_categories"].values()) == {1}
    [warning] = [w for w in line.warnings if "holds out nothing" in w]
    assert warning.startswith("eval_share 0.1 holds out nothing of 5 of 10 categories: c") and not set(
        told["held_out_categories"]
    ) & set(warning.split(": ")[1].split(", "))


@pytest.mark.parametrize(
    "sizes, share, expected",
    [
        ({"a": 4, "b": 4}, 0.1, 1),
        ({"a": 1}, 0.5, 0),
        ({"a": 2}, 0.1, 1),
        ({"a": 1, "b": 1}, 0.1, 1),
        ({"a": 20}, 0.0, 0),
        ({"a": 1, "b": 1, "c": 8}, 0.2, 2),
        (dict.fromkeys("abcdefghij", 1), 0.5, 5),
        ({"a": 100_000, "b": 3}, 0.1, 10_000),
        ({}, 0.1, 0),
    ],
)
def test_the_share_is_of_all_rows_and_never_nothing_nor_everything(sizes, share, expected):
    from stages.data.split import quotas

    counts = quotas(sizes, share)
    assert sum(counts.values()) == expected and all(0 <= counts[c] <= sizes[c] for c in sizes)
    assert not any(counts[c] for c in sizes if sizes[c] == 1) or all(
        counts[c] for c in sizes if sizes[c] > 1
    ), "the only row of a category comes last"


def test_eval_share_0_holds_out_nothing_without_a_warning(line):
    line.run(line.put("in.jsonl", talk("a"), talk("b")), eval_share=0.0)
    assert (len(line.train), line.held_out, line.warnings) == (2, [], [])


def test_rejects_stay_when_the_stage_refuses_and_the_message_names_where(line):
    path = line.put(
        "in.jsonl", *[talk(f"{n}?") for n in range(30)], *[talk("Why? " * 900 + str(n)) for n in range(25)]
    )
    with pytest.raises(
        StageError,
        match=r"25 of 55 rows are bad .* tokens, max_tokens is 2048.*or max_tokens for the long ones",
    ) as refused:
        line.run(path)
    listed = line.folder / "scratch" / "rejects.jsonl"
    assert f"in {listed}." in refused.value.remedy and [
        row["line"] for _, row in dataset.read(listed)
    ] == list(range(31, 56))
    assert len([w for w in line.warnings if "rejected: " in w]) == 20


def test_a_data_set_of_another_shape_is_answered_with_the_shapes_that_are_read(line):
    path = line.put("in.jsonl", *({"prompt": f"{n}", "completion": "x"} for n in range(5)))
    with pytest.raises(
        StageError,
        match=(
            r"5 of 5 rows are bad \(5 x no format that is read: a prompt and its completion \(completion,"
            r" prompt\)\)"
        ),
    ) as refused:
        line.run(path)
    assert all(
        key in refused.value.remedy for key in ('{"messages": [', '{"conversations": [', '{"instruction": ')
    )


def test_keys_that_are_not_used_are_counted_in_one_warning(line):
    told = line.run(
        line.put("in.jsonl", talk("a", source="x"), talk("b", source="y", n=1), talk("c", id=1)),
        eval_share=0.0,
    )
    assert told["unused_keys"] == {"source": 2, "n": 1} and line.warnings == [
        "keys that are not used: source (2 rows), n (1 rows)"
    ]


def test_messages_that_are_flagged_are_context_and_not_trained(line):
    row = talk("hi", "BAD ANSWER")
    row["messages"][-1]["weight"] = 0
    row["messages"] += [
        {"role": "user", "content": "no"},
        {"role": "assistant", "content": "Hello.", "weight": 1},
    ]
    told = line.run(
        line.put(
            "in.jsonl",
            row,
            {
                "messages": [
                    *row["messages"][:2],
                    {"role": "assistant", "content": "WORSE", "train": False},
                    *row["messages"][3:],
                ]
            },
        ),
        eval_share=0.0,
    )
    assert (
        line.trained() == ["Hello.<|im_end|>"] * 2
        and "BAD ANSWER" in line.train[0]["text"]
        and told["unused_keys"] == {}
    )


def test_a_row_with_nothing_left_to_train_is_a_reject(line):
    row = talk("hi")
    row["messages"][-1]["train"] = False
    told = line.run(line.put("in.jsonl", row, talk("b")), eval_share=0.0, max_reject_share=0.5)
    assert told["reasons"] == {"no token to train on": 1}


def test_calls_that_no_tool_declares_are_counted_warned_of_or_refused(line):
    wrong = [
        called(tools=[], question="a"),
        called('{"mins": 5}', question="b"),
        called(question="c"),
        called(tools=[{"name": "fly", "description": "x"}], question="d"),
    ]
    path = line.put("in.jsonl", *wrong)
    told = line.run(path, eval_share=0.0, max_tokens=4096)
    assert told["undeclared_calls"] == {
        "calls set_timer, which the row's tools do not declare": 2,
        "argument mins of set_timer is not in its schema": 1,
        "argument minutes of set_timer is missing": 1,
    }
    [warning] = line.warnings
    assert warning.startswith(
        "3 of 4 rows have calls that their tools do not allow, first in.jsonl:1 (calls set_timer"
    )
    with pytest.raises(StageError, match="3 of 4 rows have calls"):
        line.run(path, undeclared_calls="refuse")


def test_tools_that_are_inserted_declare_the_calls(line):
    told = line.run(
        line.put("in.jsonl", called(tools=[])),
        file=TOOLS,
        tools="insert",
        undeclared_calls="refuse",
        eval_share=0.0,
        max_tokens=4096,
    )
    assert told["undeclared_calls"] == {} and told["tools_inserted"] == 1


def test_reasoning_is_left_out_with_a_warning_or_trained(line):
    row = talk("a")
    row["messages"][-1]["reasoning"] = "Let me greet."
    path = line.put("in.jsonl", row, talk("b"))
    told = line.run(path, eval_share=0.0)
    assert (
        told["reasoning"] == 1
        and line.trained() == ["Hello.<|im_end|>"] * 2
        and "greet" not in json.dumps(line.train)
    )
    assert line.warnings == ["1 of 2 rows have reasoning, which is left out"]
    line.run(path, eval_share=0.0, reasoning="train")
    assert (
        line.trained()[0].startswith("Let me greet.")
        and line.trained()[1] == "Hello.<|im_end|>"
        and not line.warnings
    )


def test_results_in_another_order_are_put_in_the_order_of_the_calls(line):
    row = called(question="two")
    calls = [
        {"id": name, "type": "function", "function": {"name": "set_timer", "arguments": {"minutes": n}}}
        for n, name in enumerate("ab", 1)
    ]
    row["messages"][2:4] = [
        {"role": "assistant", "content": None, "tool_calls": calls},
        *({"role": "tool", "tool_call_id": name, "content": f"result {name}"} for name in "ba"),
    ]
    line.run(line.put("in.jsonl", row), eval_share=0.0)
    assert line.train[0]["text"].index("result a") < line.train[0]["text"].index("result b")


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([{"role": "tool", "tool_call_id": "c", "content": "ok"}], "calls no tool"),
        (
            [{"role": "user", "content": "x"}, {"role": "function", "name": "f", "content": "ok"}],
            "calls no tool",
        ),
        ([{"role": "user", "content": "Here: <s>old</s> new"}], "holds <s>"),
        ([{"role": "user", "content": "say <|im_end|>"}], r"holds <\|im_end\|>"),
    ],
)
def test_what_the_template_cannot_tell_apart_is_a_reject(line, turns, reason):
    row = talk("hi")
    row["messages"][1:1] = turns
    with pytest.raises(StageError, match=reason):
        line.run(line.put("in.jsonl", row))
