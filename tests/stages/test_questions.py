"""Questions: every field, production's prompt and tools, and what stands in the training data."""

import copy
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import contracts
import pytest
import yaml

from stages import check
from stages.evaluate import overlap, questions, sources, training_answers
from stages.evaluate.questions import Question
from stages.package import sources as package_sources

REPO = Path(__file__).resolve().parents[2]
SAMPLE = REPO / "data" / "sample"
TOOL = {
    "type": "function",
    "function": {"name": "set_timer", "description": "A timer", "parameters": {"type": "object"}},
}
GOOD = {
    "id": "one",
    "category": "some",
    "tools": [TOOL],
    "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Where?"}],
    "expect": {
        "no_tool": True,
        "max_words": 20,
        "must_say": ["here", ["there", "far"]],
        "must_not_say": ["no"],
        "unknown": False,
        "names": ["Priya"],
    },
}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "set_timer", "arguments": {"minutes": 5}}}],
}


def changed(path, value):
    """GOOD with the value at `path` replaced; None removes it."""
    row = copy.deepcopy(GOOD)
    *above, last = path
    inner = row
    for key in above:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return row


def test_a_question_with_every_field_is_right():
    assert list(questions.faults(GOOD)) == []
    assert list(questions.faults(changed(["tools"], None))) == []
    assert (
        list(
            questions.faults(
                changed(["messages"], [*GOOD["messages"], CALLED, {"role": "tool", "content": "ok"}])
            )
        )
        == []
    )
    assert (
        list(
            questions.faults(
                changed(["expect"], {"tool": {"name": "set_timer", "arguments": {"minutes": 5}}})
            )
        )
        == []
    )
    assert list(questions.faults(changed(["expect"], {}))) == []


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"question": "hi"}, "unknown key question"),
        ([], "a JSON list"),
        (changed(["category"], None), "no category"),
        (changed(["id"], None), "no id"),
        (changed(["expect"], None), "no expect"),
        (changed(["messages"], None), "no messages"),
        (changed(["id"], 7), "id = 7"),
        (changed(["id"], " "), "id = ' '"),
        (changed(["category"], []), "category = []"),
        ({**GOOD, "tool": []}, "unknown key tool"),
        (changed(["messages"], []), "messages that are no list or an empty one"),
        (changed(["messages"], ["hi"]), "message 1 with the role None"),
        (changed(["messages", 1, "role"], "human"), "message 2 with the role 'human'"),
        (changed(["messages", 1, "role"], "system"), "message 2 as a second system prompt"),
        (changed(["messages", 1, "content"], 3), "message 2 without text"),
        (changed(["messages", 1, "role"], "assistant"), "a last message of assistant"),
        (changed(["messages"], [*GOOD["messages"], CALLED]), "a last message of assistant"),
        (changed(["messages"], [{"role": "system", "content": "x"}]), "a last message of system"),
        (changed(["messages"], [{"role": "tool", "content": "x"}]), "no message of user"),
        (changed(["messages"], [{**CALLED, "role": "user"}]), "message 1 without text"),
        (changed(["messages"], [{**CALLED, "role": "user", "content": "x"}]), "tool_calls of message 1"),
        (
            changed(["messages"], [{**CALLED, "tool_calls": [{}]}, GOOD["messages"][1]]),
            "tool_calls of message 1",
        ),
        (changed(["tools"], {}), "tools as a JSON dict"),
        (changed(["tools"], [{}]), "tool 1 without a name"),
        (changed(["tools"], ["x"]), "tool 1 without a name"),
        (changed(["tools"], [TOOL, TOOL["function"]]), "the tool set_timer twice"),
        (changed(["expect"], []), "expect as a JSON list"),
        (changed(["expect", "max_word"], 3), "unknown key max_word"),
        (changed(["expect", "max_words"], 0), "expect.max_words = 0"),
        (changed(["expect", "max_words"], "9"), "expect.max_words = '9'"),
        (changed(["expect", "max_words"], True), "expect.max_words = True"),
        (changed(["expect", "max_words"], 2.5), "expect.max_words = 2.5"),
        (changed(["expect", "no_tool"], "yes"), "expect.no_tool = 'yes'"),
        (changed(["expect", "unknown"], 1), "expect.unknown = 1"),
        (changed(["expect", "must_say"], "Paris"), "expect.must_say"),
        (changed(["expect", "must_say"], [""]), "expect.must_say"),
        (changed(["expect", "must_say"], [[]]), "expect.must_say"),
        (changed(["expect", "must_say"], [["a", 3]]), "expect.must_say"),
        (changed(["expect", "must_not_say"], "no"), "expect.must_not_say"),
        (changed(["expect", "must_not_say"], []), "expect.must_not_say"),
        (changed(["expect", "names"], [""]), "expect.names"),
        (changed(["expect"], {"tool": "set_timer"}), "expect.tool"),
        (changed(["expect"], {"tool": {"name": "set_timer"}}), "expect.tool"),
        (changed(["expect"], {"tool": {"name": "set_timer", "arguments": "{}"}}), "expect.tool"),
        (changed(["expect"], {"tool": {"name": "set_tmer", "arguments": {}}}), "expect.tool names set_tmer"),
        (
            changed(["expect"], {"tool": {"name": "set_timer", "arguments": {}}, "no_tool": True}),
            "expect.tool beside no_tool",
        ),
    ],
)
def test_a_field_that_is_wrong_is_named(row, found):
    assert found in [text for text, _ in questions.faults(row)]


def test_a_file_names_each_bad_line_and_keeps_the_good_ones(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(
        b"\n".join(
            [
                json.dumps(GOOD).encode(),
                b"",
                b"{",
                json.dumps(GOOD).encode(),
                json.dumps({**GOOD, "id": "two"}).encode(),
                b'{"id": "\xff"}',
            ]
        )
    )
    asked, wrong = questions.read(path)
    assert [q.place for q in asked] == ["questions.jsonl:1", "questions.jsonl:5"]
    assert [(f.subject, f.found.split(" ")[0]) for f in wrong] == [
        ("questions.jsonl:3", "not"),
        ("questions.jsonl:4", "the"),
        ("questions.jsonl:6", "not"),
    ]
    path.write_text("\n")
    assert questions.read(path)[1][0].found == "no question"
    assert questions.read(tmp_path)[1][0].found == "no file"


def test_a_stale_prompt_is_refused_with_a_diff():
    asked = [
        Question("q:1", GOOD),
        Question("q:2", {**GOOD, "id": "two"}),
        Question("q:3", {**GOOD, "messages": GOOD["messages"][1:]}),
    ]
    assert [f.found for f in questions.prompt_findings(asked, "Be short.\n")] == [
        "1 of 3 questions with another system prompt; one has none"
    ]
    (found,) = questions.prompt_findings(asked[:2], "Be short.\nBe kind.")
    assert (
        found.subject == "q:1"
        and "2 of 2 questions" in found.found
        and "-Be kind." in found.found
        and "+++ q:1" in found.found
    )


@pytest.mark.parametrize(
    ("production", "found"),
    [
        ([TOOL], None),
        ([TOOL["function"]], None),
        ([{"type": "function", "function": {**TOOL["function"], "strict": True}}], None),
        ([], "tools that production does not have: set_timer"),
        (
            [{**TOOL, "function": {**TOOL["function"], "name": "timer"}}],
            "tools that production does not have: set_timer",
        ),
        (
            [{**TOOL, "function": {**TOOL["function"], "description": "Another"}}],
            "tools defined otherwise than in production: set_timer",
        ),
        (
            [{**TOOL, "function": {**TOOL["function"], "parameters": {}}}],
            "tools defined otherwise than in production: set_timer",
        ),
    ],
)
def test_tools_are_those_of_production(production, found):
    assert [
        f.found.partition(" with ")[2] for f in questions.tool_findings([Question("q:1", GOOD)], production)
    ] == ([found] if found else [])


# --- questions that were trained on -------------------------------------------------------------------------


def asking(text, *before):
    messages = [{"role": "system", "content": "Be short."}]
    for earlier in before:
        messages += [{"role": "user", "content": earlier}, {"role": "assistant", "content": "Yes."}]
    return [*messages, {"role": "user", "content": text}]


def trained(text, *before):
    return [("talks.jsonl:4", [*asking(text, *before), {"role": "assistant", "content": "Yes."}])]


def found(question, training):
    return [f.found for f in overlap.findings([Question("q:1", {**GOOD, "messages": question})], training)]


LONG = "Please tell me how late the last train to Mysuru leaves tonight."


@pytest.mark.trap("held-out-rows-are-trained")
@pytest.mark.parametrize(
    "copied",
    [
        LONG,
        LONG.upper(),
        LONG.replace(".", " ?!"),
        f"  {LONG}\n",
        LONG.replace("Mysuru", "Hampi"),
        LONG.replace("tonight", "today"),
        f"So, {LONG}",
        LONG.replace("Please ", ""),
    ],
)
def test_a_question_with_another_case_punctuation_or_word_is_found(copied):
    assert len(found(asking(copied), trained(LONG))) == 1
    assert (
        len(
            found(
                asking("And then?", "Tell me a story about a fox and an owl"),
                trained(LONG) + trained("and then", "tell me a story about a fox and an owl"),
            )
        )
        == 1
    )


@pytest.mark.parametrize(
    ("question", "training"),
    [
        (asking("What is the capital of France?"), trained("What is the capital of Japan?")),
        # says nothing without what was asked before
        (asking("And then?", "Tell me about foxes"), trained("And then?", "What is the time in Udupi")),
        (asking("Yes"), trained("Yes", "Shall I?")),
        (asking(LONG), [("talks.jsonl:1", asking(LONG))]),  # no answer follows: nothing is learnt of it
        (asking(""), trained("Where?")),
    ],
)
def test_a_question_that_shares_some_words_is_no_copy(question, training):
    assert found(question, training) == []


def test_a_long_question_is_found_inside_a_conversation_and_a_tools_result_counts():
    assert found(asking(LONG), trained(LONG, "Good morning.")) == [
        "question one, which stands in the training data at talks.jsonl:4"
    ]
    result = [CALLED, {"role": "tool", "content": '{"celsius": 31, "sky": "clear", "wind": "light"}'}]
    other = [CALLED, {"role": "tool", "content": '{"celsius": 12, "sky": "rain", "wind": "strong"}'}]
    answer = {"role": "assistant", "content": "It is."}
    assert found([*asking("Weather?"), *result], [("t:1", [*asking("Weather?"), *other, answer])]) == []
    assert len(found([*asking("Weather?"), *result], [("t:1", [*asking("Weather?"), *result, answer])])) == 1


def test_the_index_of_rare_words_finds_what_comparing_all_with_all_finds():
    random_ = random.Random(5)
    vocabulary = [f"w{n}" for n in range(12)]
    texts = [" ".join(random_.choices(vocabulary, k=random_.randint(1, 25))) for _ in range(60)]
    near = [
        " ".join(random_.choice(vocabulary) if random_.random() < 0.06 else word for word in text.split())
        for text in texts
    ]
    asked = [
        Question(f"q:{n}", {**GOOD, "id": str(n), "messages": asking(text)}) for n, text in enumerate(texts)
    ]
    training = [row for text in near for row in trained(text)]
    expected = [
        n
        for n, text in enumerate(texts)
        if any(overlap.alike(overlap.words(text), overlap.words(other)) for other in near)
    ]
    assert [int(f.subject[2:]) for f in overlap.findings(asked, training)] == expected and 20 < len(
        expected
    ) < 60


# --- before the first stage ---------------------------------------------------------------------------------


def given(tmp_path, rows, gate=None):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompt.txt").write_text("Be short.\n")
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    (tmp_path / "talks").mkdir(exist_ok=True)
    (tmp_path / "talks" / "a.jsonl").write_text(json.dumps({"messages": trained(LONG)[0][1]}) + "\n{\n[]\n")
    data = check.PlannedStage(
        "data",
        {},
        {
            "prompt": [tmp_path / "prompt.txt"],
            "tools": [tmp_path / "tools.json"],
            "conversations": [tmp_path / "talks"],
        },
    )
    return check.PlannedStage(
        "evaluate",
        contracts.defaults("evaluate", gate=gate or {"tuned": 0.9}),
        {"questions": [path]},
        {"data": data},
    )


def test_good_questions_have_no_finding_and_bad_ones_have_all(tmp_path):
    assert sources.check_sources(given(tmp_path, [GOOD])) == []
    rows = [
        {"question": "hi"},
        {**GOOD, "id": "stale", "messages": GOOD["messages"][1:]},
        {**GOOD, "id": "tool", "tools": [{"name": "other"}]},
        {**GOOD, "id": "copy", "messages": asking(LONG)},
    ]
    wrong = sources.check_sources(given(tmp_path, rows, {"nvfp4": {"within": 0.1}}))
    said = [f"{f.subject}: {f.found}" for f in wrong]
    assert [line.partition(":")[0] for line in said] == ["evaluate.gate", *["questions.jsonl"] * 5]
    assert (
        said[-1] == "questions.jsonl:4: question copy, which stands in the training data at talks/a.jsonl:1"
    )


def test_the_sample_passes_its_own_check_and_a_copied_line_does_not(tmp_path):
    data = check.PlannedStage(
        "data",
        {},
        {
            "prompt": [SAMPLE / "system_prompt.txt"],
            "tools": [SAMPLE / "tools.json"],
            "conversations": [SAMPLE / "conversations"],
        },
    )
    its = check.PlannedStage(
        "evaluate",
        contracts.defaults("evaluate", gate="none"),
        {"questions": [SAMPLE / "questions.jsonl"]},
        {"data": data},
    )
    assert sources.check_sources(its) == []
    row = json.loads((SAMPLE / "conversations" / "concise_voice.jsonl").read_text().splitlines()[0])
    last = max(n for n, m in enumerate(row["messages"]) if m["role"] == "assistant")
    copied = {
        "id": "copy",
        "category": "some",
        "messages": row["messages"][:last],
        "tools": row.get("tools") or [],
        "expect": {},
    }
    (tmp_path / "q.jsonl").write_text(json.dumps(copied) + "\n")
    (found,) = sources.check_sources(
        check.PlannedStage(
            "evaluate",
            contracts.defaults("evaluate", gate="none"),
            {"questions": [tmp_path / "q.jsonl"]},
            {"data": data},
        )
    )
    assert "which stands in the training data at conversations/concise_voice.jsonl:1" in found.found


def own(tmp_path, *texts, tools=None, checks=None):
    """Stage evaluate with the `checks`, and conversations that are answered with `texts`."""
    rows = [{"messages": [*asking(LONG), {"role": "assistant", "content": text}]} for text in texts]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tools.json").write_text(json.dumps(tools or []))
    files = {"conversations": [tmp_path / "talks.jsonl"], "tools": [tmp_path / "tools.json"]}
    return check.PlannedStage(
        "evaluate",
        contracts.defaults("evaluate", gate="none", checks=checks or {}),
        {},
        {"data": check.PlannedStage("data", {"eval_share": 0.1}, files)},
    )


@pytest.mark.parametrize(
    ("mode", "texts", "setting"),
    [
        ("follow_up", ["Which day? Which time?", "Booked."], "{question_marks: 2}"),
        (
            "follow_up",
            ["Let me know."],
            '{phrases: ["would you like", "shall i", "do you want", "want me to", "can i help", "anything'
            ' else"]}',
        ),
        ("verbosity", ["word " * 57, "word " * 41], "{max_words: 60}"),
        ("markdown", ["- rice\n- **dal**", "1. rice"], '{allowed: ["bold", "list", "numbered_list"]}'),
        ("emoji", ["Done ✅.", "Done ✅ 🎉."], '{allowed: ["✅", "🎉"]}'),
        ("emoji", ["1️⃣ 🇮🇳"], '{allowed: ["\ufe0f", "\u20e3", "🇮", "🇳"]}'),
        ("emoji", ["🌀🌁🌂🌃🌄🌅🌆🌇"], "off"),
        ("tool_leak", ["I call set_timer now."], "off"),
        ("think_leak", ["<think>So.</think> Now."], "off"),
    ],
)
def test_training_answers_that_fail_a_check_are_told_with_a_setting_that_lets_them_pass(
    tmp_path, mode, texts, setting
):
    (warning,) = sources.check_sources(own(tmp_path, *texts, tools=[TOOL]))
    assert (warning.subject, warning.level) == (f"evaluate.checks.{mode}", "warning")
    assert "the first at talks.jsonl:1: " in warning.found
    assert f"evaluate: {{checks: {{{mode}: {setting}}}}}" in warning.remedy
    relaxed = {mode: yaml.safe_load(setting)}
    assert sources.check_sources(own(tmp_path, *texts, tools=[TOOL], checks=relaxed)) == []


def test_a_word_that_is_banned_and_trained_is_told(tmp_path):
    banned = {"fabrication": {"must_not_say": ["as an AI", "Paris"]}}
    (warning,) = sources.check_sources(own(tmp_path, "PARIS.", checks=banned))
    assert '{fabrication: {must_not_say: ["as an AI"]}}' in warning.remedy


def test_an_answer_that_is_not_trained_is_not_counted():
    messages = [
        {"role": "assistant", "content": "A?", "weight": 0},
        {"role": "assistant", "content": "B?", "train": False},
        {"role": "user", "content": "C?"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": "D?", "weight": 1},
    ]
    answers = list(training_answers.trained([("t:1", {"messages": messages, "tools": "[]"})]))
    assert [(a.place, a.text) for a in answers] == [("t:1", "D?")]


def test_an_expectation_that_no_check_judges_is_told(tmp_path):
    stage = given(tmp_path, [GOOD, {**GOOD, "id": "two", "expect": {"checks": {"fabrication": True}}}])
    stage.params["checks"] = {"fabrication": False, "follow_up": False}
    (warning,) = sources.check_sources(stage)
    assert (warning.subject, warning.level) == ("evaluate.checks.fabrication", "warning")
    assert warning.found == (
        "it off, and 1 questions that expect must_say or must_not_say, the first at questions.jsonl:1"
    )


@pytest.mark.parametrize(("share", "count"), [(0, 1), (0.1, 0)])
def test_nothing_held_out_and_no_questions_is_named_before_the_first_stage(share, count):
    data = check.PlannedStage("data", {"eval_share": share})
    assert (
        len(
            sources.check_sources(
                check.PlannedStage(
                    "evaluate", contracts.defaults("evaluate", gate="none"), {}, {"data": data}
                )
            )
        )
        == count
    )


@pytest.mark.parametrize(
    ("params", "subject"),
    [
        ({"gate": {}, "control": False}, "evaluate.gate"),
        ({"gate": {"tuned": 0.9}, "control": True}, "evaluate.control"),
        ({"gate": "none", "control": False}, None),
        ({"gate": {"tuned": 0.9}, "control": False}, None),
    ],
)
def test_an_image_that_no_gate_lets_through_is_named_before_the_first_stage(params, subject):
    wrong = package_sources.check_sources(
        check.PlannedStage("package", {}, {}, {"evaluate": check.PlannedStage("evaluate", params)})
    )
    assert [f.subject for f in wrong] == ([subject] if subject else [])


def test_a_check_shows_so_many_findings_and_counts_the_rest(capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.StringIO('{"stage": "evaluate", "device": "cpu", "params": {}, "sources": {}}')
    )
    check.main(lambda its: [check.Finding(f"q:{n}", "x", "y") for n in range(50)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == check.MOST + 1 and lines[-1]["found"] == "30 more findings of this kind"


@pytest.mark.parametrize("module", ["stages.evaluate.sources", "stages.package.sources", "stages.data.check"])
def test_a_check_needs_the_standard_library_alone(module):
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import {module}"],
        cwd=REPO,
        capture_output=True,
        text=True,
        env={"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("device", "cache", "asked", "level", "said"),
    [
        (
            "cpu",
            "none",
            "auto",
            "note",
            "BF16 for the quantised model, since the checkpoint asks for no other",
        ),
        (
            "cpu",
            "FP8",
            "auto",
            "note",
            (
                "BF16 for the quantised model, since vLLM has the FP8 that the checkpoint asks for on some"
                " CPUs only"
            ),
        ),
        ("cuda", "FP8", "auto", "note", "FP8 for the quantised model, since the checkpoint asks for it"),
        ("cuda", "none", "fp8", "note", "FP8 for the quantised model, since the recipe asks for it"),
        ("cuda", "FP8", "bfloat16", "note", "BF16 for the quantised model, since the recipe asks for it"),
    ],
)
def test_the_kv_cache_is_said_with_its_reason(device, cache, asked, level, said):
    quantize = check.PlannedStage("quantize", {"kv_cache": cache})
    (found,) = sources.kv_cache_findings(
        check.PlannedStage(
            "evaluate",
            contracts.defaults("evaluate", kv_cache=asked),
            inputs={"quantize": quantize},
            device=device,
        )
    )
    assert (found.level, found.found) == (level, said)


def test_an_fp8_cache_that_this_cpu_lacks_is_refused_before_the_first_stage(monkeypatch):
    from model.families import serve

    monkeypatch.setattr(serve, "fp8_on_cpu", lambda cpuinfo: False)
    stage = check.PlannedStage(
        "evaluate",
        contracts.defaults("evaluate", kv_cache="fp8"),
        inputs={"quantize": check.PlannedStage("quantize", {"kv_cache": "none"})},
    )
    (found,) = sources.kv_cache_findings(stage)
    assert found.level == "error" and "AVX-512" in found.found and "kv_cache: auto" in found.remedy
