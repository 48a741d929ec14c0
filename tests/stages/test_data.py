"""Conversations become tokens: every bad line is named, and what is trained is the user's own talk, once
and under one prompt.
"""

import io
import json
import re
import statistics
from pathlib import Path

import contracts
import pytest

from stages import job
from stages.base import make
from stages.data import prepare
from stages.job import Job, StageError

REPO = Path(__file__).resolve().parents[2]
PROMPT = "You are Annie.\n<rules>\n1. Be brief.\n2. No markdown.\n</rules>"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "set_timer",
            "description": "Start a timer",
            "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}},
        },
    }
]
PARAMS = {
    "max_tokens": 500,
    "eval_share": 0.0,
    "other_prompts": "refuse",
    "max_reject_share": 1.0,
    "missing_prompt": "refuse",
    "tools": "allow",
}


def talk(question, answer="Yes, Rajesh.", prompt=PROMPT, **more):
    turns = [
        {"role": "system", "content": prompt},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": turns, **more}


def timer(arguments):
    call = {"id": "c", "type": "function", "function": {"name": "set_timer", "arguments": arguments}}
    row = talk("Tea timer.", tools=TOOLS)
    row["messages"][-1] = {"role": "assistant", "content": None, "tool_calls": [call]}
    return row


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make.make_tokenizer(
        [talk(f"Is it {word}?") for word in ("late", "warm", "far")] + [timer({"minutes": 5})], 512, folder
    )
    (folder / "config.json").write_text('{"model_type": "nemotron_h", "vocab_size": 512}')
    return folder


def written(folder, **files):
    """JSONL files by their stems; a row is a dict, or the bytes of its line."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, rows in files.items():
        (folder / f"{stem}.jsonl").write_bytes(
            b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows) + b"\n"
        )
    return folder


def prepared(base, folder, conversations, prompt=PROMPT, **params):
    """The output of the stage."""
    folder.mkdir(exist_ok=True)
    (folder / "prompt.txt").write_text(prompt + "\n")
    (folder / "tools.json").write_text(json.dumps(TOOLS))
    (folder / "output").mkdir()
    sources = {
        "conversations": conversations,
        "prompt": [folder / "prompt.txt"],
        "tools": [folder / "tools.json"],
    }
    prepare.run(
        Job(
            "data",
            contracts.defaults("data", **{**PARAMS, **params}),
            {"base": base},
            folder / "output",
            folder,
            0,
            sources,
        )
    )
    return folder / "output"


def lines(output, name):
    return [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]


def stats(output):
    return json.loads((output / "stats.json").read_text())


def questions(output, name="train"):
    return [row["messages"][1]["content"] for row in lines(output, name)]


BAD = {
    "not JSON": (b'{"messages": [', "not JSON"),
    "half a character": (b'{"messages": [{"role": "user", "content": "\xe0\xb2"}]}', "not UTF-8: byte 0xe0"),
    "NUL-filled tail": (json.dumps(talk("Late?")).encode()[:-9] + b"\0" * 64, "NUL bytes"),
    "unknown role": (
        {"messages": [{"role": "bot", "content": "Hi"}, *talk("Hi?")["messages"]]},
        "message 1 has the unknown role 'bot'",
    ),
    "empty assistant turn": (talk("Hello?", " "), "message 3 is an empty assistant turn"),
    "nothing to train on": ({"messages": talk("Hello?")["messages"][:2]}, "nothing to train on"),
    "too long": (talk("Why? " * 500), r"\d+ tokens, max_tokens is 500"),
    "a null argument": (timer('{"minutes": null}'), "argument minutes of set_timer is null"),
    "arguments that are no JSON": (timer("{minutes: 5}"), "arguments of set_timer are not JSON"),
    "no content": (talk("Hello?", None), "content of message 3 is null"),
    "thinks aloud": (talk("Hello?", "<think>hm</think>Hi."), "message 3 thinks aloud"),
    "a number without end": (b'{"messages": ' + b"1" * 5000 + b"}", "not JSON"),
    "half a surrogate pair": (
        b'{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "Hi."}]}',
        "surrogate",
    ),
}


@pytest.fixture(scope="module")
def sieved(base, tmp_path_factory):
    """One good row, an empty line, then every bad one from line 3 on."""
    folder = tmp_path_factory.mktemp("sieved")
    written(folder / "talks", mixed=[talk("Good?"), b"", *(line for line, _ in BAD.values())])
    return prepared(base, folder, [folder / "talks"])


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_rejected_with_its_file_line_and_reason(sieved, kind):
    place = list(BAD).index(kind) + 3
    [reject] = [r for r in lines(sieved, "rejects") if r["line"] == place]
    assert reject["file"] == "talks/mixed.jsonl" and re.search(BAD[kind][1], reject["reason"]), reject
    assert len(reject["head"]) <= 200


def test_the_good_line_among_bad_ones_is_kept_and_all_are_counted(sieved):
    assert questions(sieved) == ["Good?"]
    assert (stats(sieved)["train"], stats(sieved)["rejected"], sum(stats(sieved)["reasons"].values())) == (
        1,
        len(BAD),
        len(BAD),
    )


def test_too_many_bad_lines_stop_the_stage_and_are_listed(base, tmp_path):
    folder = written(tmp_path / "talks", a=[talk(f"Is it {n}?") for n in range(8)] + [b"{", b"{"])
    with pytest.raises(StageError, match=r"2 of 10 rows are bad \(2 x not JSON.*first talks/a.jsonl:9"):
        prepared(base, tmp_path, [folder], max_reject_share=0.1)
    assert [r["line"] for r in lines(tmp_path, "rejects")] == [
        9,
        10,
    ], "in the scratch folder: the output of a stage that refuses is deleted"
    assert len(questions(prepared(base, tmp_path / "again", [folder], max_reject_share=0.2))) == 8


def test_sources_are_merged_in_their_order_and_duplicates_left_out(base, tmp_path):
    first = written(tmp_path / "z", b=[talk("Two?")], a=[talk("One?"), talk("Same?")])
    second = written(
        tmp_path / "a", c=[talk("Same?", category="filed elsewhere"), talk("Same?", "No."), talk("Three?")]
    )
    output = prepared(base, tmp_path, [first, second / "c.jsonl"])
    places = [f"{row['file']}:{row['line']}" for row in lines(output, "train")]
    assert places == ["z/a.jsonl:1", "z/a.jsonl:2", "z/b.jsonl:1", "c.jsonl:2", "c.jsonl:3"]
    assert (
        questions(output) == ["One?", "Same?", "Two?", "Same?", "Three?"] and stats(output)["duplicates"] == 1
    )
    assert stats(output)["categories"] == {
        "a": 2,
        "b": 1,
        "c": 2,
    }, "a row without a category is filed under its file's name"


STALE = PROMPT.replace("2. No markdown.\n", "2. Use emoji.\n")


@pytest.mark.trap("stale-prompt")
def test_a_stale_prompt_is_counted_shown_and_refused(base, tmp_path):
    folder = written(
        tmp_path / "talks",
        a=[
            talk("One?"),
            talk("Two?", prompt=STALE),
            talk("Three?", prompt=STALE),
            talk("Four?", prompt="Hi."),
        ],
    )
    with pytest.raises(StageError) as refused:
        prepared(base, tmp_path, [folder])
    assert "3 of 4 rows with 2 other system prompts; the most common (2 rows)" in refused.value.found
    shown = refused.value.found.splitlines()
    assert "+++ talks/a.jsonl:2" in shown and "-2. No markdown." in shown and "+2. Use emoji." in shown
    assert "other_prompts: allow" in refused.value.remedy


def test_a_stale_prompt_that_the_recipe_allows_is_trained_with_a_warning(base, tmp_path, monkeypatch):
    events = io.StringIO()
    monkeypatch.setattr(job, "_events", events)
    output = prepared(
        base,
        tmp_path,
        [written(tmp_path / "talks", a=[talk("One?"), talk("Two?", prompt=STALE)])],
        other_prompts="allow",
    )
    assert stats(output)["other_prompts"] == 1 and questions(output) == ["One?", "Two?"]
    assert [
        e["remedy"]
        for e in map(json.loads, events.getvalue().splitlines())
        if e["event"] == "warning" and "1 of 2 rows" in e["message"]
    ]
    assert (
        lines(output, "train")[1]["messages"][0]["content"] == STALE
        and (output / "prompt.txt").read_text() == PROMPT + "\n"
    )


def test_the_same_share_of_each_category_is_held_out_whatever_the_order(base, tmp_path):
    many = {
        category: [talk(f"Is {category} {n}?", category=category) for n in range(count)]
        for category, count in (("small", 10), ("large", 30))
    }
    forwards = prepared(
        base, tmp_path / "one", [written(tmp_path / "f", a=many["small"], b=many["large"])], eval_share=0.2
    )
    turned = [written(tmp_path / "b", a=many["large"][::-1]), written(tmp_path / "c", a=many["small"][::-1])]
    backwards = prepared(base, tmp_path / "two", turned, eval_share=0.2)
    held = [row["category"] for row in lines(forwards, "eval")]
    assert (held.count("small"), held.count("large"), stats(forwards)["train"]) == (2, 6, 32)
    for name in ("train", "eval"):
        assert {r["id"] for r in lines(forwards, name)} == {r["id"] for r in lines(backwards, name)}
    assert not set(questions(forwards)) & set(questions(forwards, "eval"))


def test_sources_that_leave_nothing_to_train_on_are_refused(base, tmp_path):
    with pytest.raises(StageError, match="no row left to train on"):
        prepared(base, tmp_path, [written(tmp_path / "talks", a=[talk("Why? " * 500)])])
    with pytest.raises(StageError, match="no rows in the sources"):
        prepared(base, tmp_path / "empty", [written(tmp_path / "empty" / "talks", a=[b""])])
    (tmp_path / "none").mkdir()
    with pytest.raises(StageError, match="no file of conversations in none"):
        prepared(base, tmp_path / "nothing", [tmp_path / "none"])


@pytest.mark.trap("few-trained-tokens")
def test_the_trained_share_is_told_by_conversation_and_a_small_one_warned_of(base, tmp_path, monkeypatch):
    events = io.StringIO()
    monkeypatch.setattr(job, "_events", events)
    prompt = PROMPT + " Never forget." * 30
    folder = written(
        tmp_path / "talks",
        a=[talk("One?", "Yes.", prompt), talk("Two?", prompt=prompt), talk("Three?", prompt=prompt)],
    )
    output = prepared(base, tmp_path, [folder], prompt, max_tokens=2048)
    rows, told = lines(output, "train"), stats(output)
    trained = [sum(label != -100 for label in row["labels"]) for row in rows]
    shares = [part / len(row["input_ids"]) for part, row in zip(trained, rows, strict=True)]
    assert all(trained) and told["trained_tokens"] == sum(trained)
    assert told["lowest_trained_share"] == round(min(shares), 4) and told["median_trained_share"] == round(
        statistics.median(shares), 4
    )
    assert sum(told["histograms"]["trained_tokens"]["counts"]) == len(rows)
    assert told["trained_share"] < prepare.LITTLE and "of the tokens are trained" in events.getvalue()


def test_the_artifact_is_what_the_formats_promise(base, tmp_path):
    formats = (REPO / "docs" / "formats.md").read_text()
    output = prepared(
        base,
        tmp_path,
        [written(tmp_path / "talks", a=[talk("One?"), timer('{"minutes": 5}'), talk("Two?"), b"{"])],
        eval_share=0.5,
    )
    promised = re.search(r"^\| `chat-dataset` \| data \| (.*) \|$", formats, re.MULTILINE).group(1)
    assert {p.name for p in output.iterdir()} == set(re.findall(r"`([^`]+)`", promised))
    keys = re.search(r"`chat-dataset`: a row.*\n`\{(.*)\}`;", formats).group(1)
    rows = lines(output, "train") + lines(output, "eval")
    assert len(rows) == 3 and all(list(row) == re.findall(r'"(\w+)"', keys) for row in rows)
    assert all(len(row["input_ids"]) == len(row["labels"]) > 0 for row in rows)
    [call] = [m for row in rows for m in row["messages"] if m.get("tool_calls")]
    assert call["tool_calls"][0]["function"]["arguments"] == {"minutes": 5}
    assert json.loads((output / "tools.json").read_text()) == TOOLS
    assert (output / "tokens.png").read_bytes().startswith(b"\x89PNG") and (
        output / "tokens.png"
    ).stat().st_size > 5000


def test_the_sample_data_set_passes_without_a_reject(base, tmp_path):
    sample = REPO / "data" / "sample"
    output = prepared(
        base,
        tmp_path,
        [sample / "conversations"],
        (sample / "system_prompt.txt").read_text().strip(),
        max_tokens=4096,
        eval_share=0.1,
    )
    told = stats(output)
    assert (told["rejected"], told["duplicates"], told["other_prompts"], len(told["categories"])) == (
        0,
        0,
        0,
        10,
    )
    assert (
        told["train"] + told["eval"] == sum(told["files"].values()) >= 300
        and 0.08 < told["eval"] / (told["train"] + told["eval"]) < 0.12
    )
