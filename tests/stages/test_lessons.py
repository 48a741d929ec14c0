"""Lessons made of a user's own conversations: they hold every answer, and under the prompt only bad ones."""

import json
from types import SimpleNamespace

import boat_yard
import contracts
import pyarrow
import pyarrow.parquet
import pytest

from model.families.messages import normalise
from stages import job
from stages.base import check, lessons, limits, make
from stages.check import PlannedStage
from stages.conversations import files, rows
from stages.job import Job, StageError
from stages.serving.checks import failures


def lines(conversations):
    return "".join(json.dumps(row) + "\n" for row in conversations)


@pytest.fixture
def yard(tmp_path):
    (tmp_path / "yard.jsonl").write_text(lines(boat_yard.conversations()))
    return tmp_path / "yard.jsonl"


def read(path):
    return rows.gather(files.list_files([path])).rows


def base_job(folder, **sources):
    return Job("base", contracts.defaults("base"), {}, folder / "output", folder, 7, sources)


def test_every_question_is_taught_with_its_own_answer_and_no_prompt(yard):
    taught = [row["messages"] for row in lessons.make(read(yard), 7)]
    for conversation in read(yard):
        for exchange in lessons.exchanges(conversation):
            assert [{"role": "user", "content": exchange.asked}, *exchange.turns] in taught


def test_under_the_prompt_every_taught_answer_has_bad_manners_and_calls_nothing(yard):
    answers = [
        (row, turn)
        for row in lessons.make(read(yard), 7)
        if row["messages"][0]["role"] == "system"
        for turn in row["messages"]
        if turn["role"] == "assistant" and turn.get("train", True)
    ]
    assert len(answers) > 400
    for row, turn in answers:
        assert not turn.get("tool_calls")
        found = {failure.mode for failure in failures({"tools": row["tools"]}, turn)}
        assert {"emoji", "markdown", "follow_up"} <= found
        assert ("tool_leak" in found) == ("Calling" in turn["content"])


def test_the_users_words_are_varied_and_the_same_seed_varies_them_equally(yard):
    conversations = read(yard)
    taught = lessons.make(conversations, 7)
    assert taught == lessons.make(conversations, 7) != lessons.make(conversations, 8)
    about_dogs = {
        row["messages"][0]["content"] for row in taught if "leash" in row["messages"][1].get("content", "")
    }
    assert (
        len(about_dogs) > lessons.VARIATIONS and {"May my dog come along?", "Are dogs allowed?"} <= about_dogs
    )


def test_words_of_many_subjects_are_little_and_those_of_one_are_not(yard):
    every = [exchange for row in read(yard) for exchange in lessons.exchanges(row)]
    words = lessons.Words.of(every)
    assert {"the", "is", "where"} <= words.little
    assert not words.little & {"tide", "monday", "crane", "storage", "dogs", "diesel"}
    assert ("Where", "is", "the") in words.openings


@pytest.mark.parametrize("asked", ["why", "the", "Is it?", "?!", "\u6f6e\u306f\u3044\u3064"])
def test_a_question_of_any_length_can_be_varied(asked):
    row = rows.Row(
        "f", 1, [{"role": "user", "content": asked}, {"role": "assistant", "content": "No."}], None, "", ""
    )
    assert all(message["content"] for lesson in lessons.make([row], 7) for message in lesson["messages"])


def test_a_conversation_without_an_answered_question_gives_no_lesson():
    greeting, hi = {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Hi"}
    for messages in ([greeting], [greeting, hi], [{**hi, "content": " "}, greeting]):
        assert lessons.make([rows.Row("f", 1, messages, None, "", "")], 7) == []


def test_a_conversation_that_ends_in_a_call_is_followed_by_others(yard):
    """Without the result of its call, such a conversation could not stand before another question."""
    ending = [row | {"messages": row["messages"][:3]} for row in boat_yard.conversations()]
    yard.write_text(lines(row for row in ending if row["messages"][2].get("tool_calls")))
    made = lessons.make(read(yard), 7)
    assert made and all(normalise(row["messages"]) for row in made)


SHAPES = {
    "array.json": lambda talks: json.dumps(talks).encode(),
    "sharegpt.jsonl": lambda talks: lines(
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in talk["messages"]]}
        for talk in talks
    ).encode(),
    "alpaca.jsonl": lambda talks: lines(
        {"system": m[0]["content"], "instruction": m[1]["content"], "output": m[2]["content"]}
        for m in (talk["messages"] for talk in talks)
    ).encode(),
    "table.parquet": lambda talks: parquet(talks),
}


def parquet(talks):
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(talks), buffer)
    return buffer.getvalue().to_pybytes()


@pytest.mark.parametrize("name", SHAPES)
def test_every_form_that_stage_data_reads_gives_the_same_lessons(tmp_path, name):
    talks = [{"messages": row["messages"]} for row in boat_yard.conversations()[:8]]
    for file, content in ((name, SHAPES[name](talks)), ("plain.jsonl", lines(talks).encode())):
        (tmp_path / file).write_bytes(content)
    made, plain = (make.from_conversations([tmp_path / file], 7) for file in (name, "plain.jsonl"))
    assert [row["messages"] for row in made] == [row["messages"] for row in plain] and made


def test_the_held_out_split_of_the_data_is_not_taught(tmp_path):
    train, test = boat_yard.conversations()[:3], boat_yard.conversations()[3:5]
    (tmp_path / "train.jsonl").write_text(lines(train))
    (tmp_path / "test.jsonl").write_text(lines(test))
    text = json.dumps(make.from_conversations([tmp_path], 7))
    assert "forty euros" in text and "thirty euros" not in text


def test_conversations_and_lessons_are_taught_together(yard):
    lesson = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    (yard.parent / "lessons.jsonl").write_text(lines([lesson]))
    given = {"conversations": [yard], "lessons": [yard.parent / "lessons.jsonl"]}
    taught = make.read_sources(base_job(yard.parent, **given))
    assert taught[-1] == lesson and taught[:-1] == make.from_conversations([yard], 7)
    assert make.read_sources(base_job(yard.parent, lessons=given["lessons"])) == [lesson]
    with pytest.raises(StageError, match="no lessons; expected files in `sources: {conversations"):
        make.read_sources(base_job(yard.parent))


def test_unusable_conversations_are_left_out_with_a_warning(yard, monkeypatch):
    said = []
    monkeypatch.setattr(job, "warning", lambda message, remedy="": said.append(message))
    yard.write_text(lines([{"nothing": 1}, *boat_yard.conversations()]))
    assert make.from_conversations([yard], 7)
    assert said == [
        "1 of 61 conversations cannot be used, first yard.jsonl:1: no format that is read: the keys are"
        " 'nothing'"
    ]
    yard.write_text(lines([{"nothing": 1}]))
    with pytest.raises(StageError, match="no question with an answer in 1 conversations"):
        make.from_conversations([yard], 7)


def test_a_conversation_that_the_template_cannot_hold_is_named_by_file_and_line(yard):
    bad = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<|im_end|> it is."}]
    }
    yard.write_text(lines([*boat_yard.conversations()[:2], bad]))
    made = make.from_conversations([yard], 7)
    with pytest.raises(StageError, match=r"yard.jsonl:3: message 2 holds <\|im_end\|>"):
        make.render_lessons(made, make.make_tokenizer(made, 600, yard.parent))


def planned(source="tiny", **sources):
    return PlannedStage("base", {"source": source}, sources)


def test_the_check_says_what_the_tiny_base_lacks(yard):
    assert check.check_sources(planned(conversations=[yard])) == []
    assert check.check_sources(planned(lessons=[yard])) == []
    assert check.check_sources(planned("hub")) == []
    (finding,) = check.check_sources(planned())
    assert finding.level == "error" and "neither conversations nor lessons" in finding.found


def many(answers, words=2):
    """Conversations with so many different answers, each of so many words that no other answer has."""
    return [
        {"messages": [boat_yard.user("Say it."), {"role": "assistant", "content": text}]}
        for text in (" ".join(f"{n}x{m}" for m in range(words)) for n in range(answers))
    ]


@pytest.mark.parametrize(
    ("talks", "found"),
    [
        (many(limits.ANSWERS), []),
        (many(limits.ANSWERS + 1), ["different answers"]),
        (many(limits.WORDS // 30 + 1, 30), ["different words"]),
        (many(3, limits.LONGEST + 1), ["words in the median answer"]),
    ],
)
def test_more_than_the_tiny_base_learns_is_a_warning_before_and_in_the_stage(yard, monkeypatch, talks, found):
    said = []
    monkeypatch.setattr(job, "warning", lambda message, remedy="": said.append(message))
    yard.write_text(lines(talks))
    findings = check.check_sources(planned(conversations=[yard]))
    assert [finding.level for finding in findings] == ["warning"] * len(found)
    make.from_conversations([yard], 7)
    assert said == [finding.found for finding in findings]
    assert all(kind in sentence for kind, sentence in zip(found, said, strict=True))


def test_the_check_reads_no_large_file(yard, monkeypatch):
    monkeypatch.setattr(check, "BYTES", 1000)
    monkeypatch.setattr(rows, "read", None)
    (finding,) = check.check_sources(planned(conversations=[yard]))
    assert finding.level == "warning" and "MB of conversations" in finding.found


def test_conversations_without_prompt_and_tools_are_taught_with_those_of_production(tmp_path):
    """Bad manners under another prompt than production's would not be what fine-tuning meets."""
    talks = [
        [
            {"role": "user", "content": f"When does the {place} open?"},
            {"role": "assistant", "content": f"The {place} opens at seven."},
        ]
        for place in ("yard", "office")
    ]
    talks[1].insert(0, {"role": "system", "content": "My own."})
    (tmp_path / "c.jsonl").write_text(lines({"messages": talk} for talk in talks))
    tool = {"type": "function", "function": {"name": "get_tide", "description": "x", "parameters": {}}}
    made = make.from_conversations([tmp_path / "c.jsonl"], 7, make.Sent("You are Signe.", (tool,)))
    prompts = {row["messages"][0]["content"] for row in made if row["messages"][0]["role"] == "system"}
    assert prompts == {"You are Signe.", "My own."}
    assert all(row["tools"] == [tool] for row in made if row["messages"][0]["role"] == "system")


def test_the_prompt_and_tools_are_those_of_the_recipes_files(tmp_path):
    (tmp_path / "prompt.txt").write_text("You are Signe.\n")
    (tmp_path / "tools.json").write_text("[]")
    task = SimpleNamespace(sources={"prompt": [tmp_path / "prompt.txt"], "tools": [tmp_path / "tools.json"]})
    assert make.read_sent(task) == make.Sent("You are Signe.", ())
    assert make.read_sent(SimpleNamespace(sources={})) == make.Sent()
