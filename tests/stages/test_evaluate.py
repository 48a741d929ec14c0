"""Evaluate: questions, servers and their columns, the report, and the gate. A toy server answers;
tests/vllm has the real one.
"""

import json
import os
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from model.families import serve
from model.families.serve import Serve
from stages import job
from stages.evaluate import asked, evaluate, failed, gate, report
from stages.evaluate.server import Server
from stages.job import Job, StageError
from stages.serving.checks import MODES, Failure

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PARAMS = {
    "max_model_len": 512,
    "max_tokens": 16,
    "concurrency": 2,
    "memory_share": 0.7,
    "kv_cache": "auto",
    "gate": {"tuned": 0.9},
    "checks": {},
    "control": False,
}
GOOD, BAD = "It is Paris.", "**Paris** 🌙"
ASKED = [
    {
        "id": f"c-{n}",
        "category": category,
        "messages": [{"role": "user", "content": "Where?"}],
        "tools": [],
        "expect": {},
    }
    for n, category in enumerate("aab")
]
TOOL = {"type": "function", "function": {"name": "set_timer", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "set_timer", "arguments": {"minutes": 5}}}


def said(role, content):
    return {"role": role, "content": content}


CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
HELD_OUT = [
    {
        "id": "talk",
        "tools": [],
        "messages": [
            said("system", "Be short."),
            said("user", "Where?"),
            said("assistant", "Far " * 12),
            said("user", "And?"),
            said("assistant", "In Paris."),
        ],
    },
    {"id": "act", "tools": [TOOL], "messages": [said("user", "Tea."), CALLED]},
    {
        "id": "result",
        "tools": [TOOL],
        "messages": [said("user", "Tea."), CALLED, said("tool", "ok"), said("assistant", "Done.")],
    },
]
TRAINED = {
    "file": "talks/a.jsonl",
    "line": 7,
    "tools": [],
    "messages": [said("user", "What is the capital of France?"), said("assistant", "Paris.")],
}


@pytest.fixture
def its(tmp_path):
    """A job on what the stages before it leave behind; the adapter is on attention."""
    inputs = {name: tmp_path / name for name in ("base", "data", "train", "merge", "quantize")}
    for folder in [*inputs.values(), inputs["train"] / "adapter", tmp_path / "output"]:
        folder.mkdir()
    adapter(inputs["train"], ["q_proj", "k_proj"])
    (inputs["base"] / "config.json").write_text('{"model_type": "nemotron_h"}')
    (inputs["quantize"] / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}})
    )
    (inputs["quantize"] / "audit.json").write_text(json.dumps({"layout": "nvidia"}))
    (inputs["data"] / "eval.jsonl").write_text(
        "".join(json.dumps({**row, "category": "some"}) + "\n" for row in HELD_OUT)
    )
    (inputs["data"] / "train.jsonl").write_text(json.dumps(TRAINED) + "\n")
    (inputs["data"] / "prompt.txt").write_text("\n")
    (inputs["data"] / "tools.json").write_text(json.dumps([TOOL]))
    return Job("evaluate", dict(PARAMS), inputs, tmp_path / "output", tmp_path, 0)


def adapter(folder, modules, **more):
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps({"r": 16, "target_modules": modules, **more})
    )


@pytest.fixture
def toy(monkeypatch):
    """A server that answers as `toy.says[folder or API name]` has it, and what it was started and asked
    with.
    """

    class Toy:
        says: ClassVar = {"base": BAD, "tuned": GOOD, "merge": GOOD, "quantize": GOOD}
        started, asked = [], []

        def __init__(self, model, serve, label, adapter=None, questions=16):
            self.model = model
            self.started.append((model.name, label, adapter and adapter.name))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def ask(self, body):
            self.asked.append(body)
            text = self.says["tuned" if body["model"] == "tuned" else self.model.name]
            return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}

        def ask_streamed(self, body):
            return self.ask(body | {"model": self.streams_as or body["model"]})

        streams_as = ""

    monkeypatch.setattr(evaluate, "Server", Toy)
    monkeypatch.setattr(serve, "installed", lambda: "0.32.0")
    return Toy


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(job, "warning", lambda message, remedy="": found.append(message))
    return found


@pytest.mark.trap("small-change-drowns-in-fp4")
def test_one_table_holds_every_model_of_the_line_in_order(its, toy, warnings):
    its.sources["questions"] = [its.scratch / "questions.jsonl"]
    its.sources["questions"][0].write_text("".join(json.dumps(q) + "\n\n" for q in ASKED))
    its.params["gate"] = {"tuned": 1.0, "nvfp4": {"at_least": 0.9, "within": 0.02, "of": "tuned"}}
    toy.says = {**toy.says, "quantize": BAD}  # a fine-tune that did not survive in 4 bits
    evaluate.run(its)
    made = json.loads((its.output / "report.json").read_text())
    assert (
        made["columns"]
        == ["base", "tuned", "merged", "nvfp4"]
        == list(made["pass"])
        == list(made["failures"])
        == list(made["seconds"])
    )
    assert made["pass"] == {"base": 0, "tuned": 1, "merged": 1, "nvfp4": 0} and made["vllm"] == "0.32.0"
    assert not made["gate"]["passed"] and made["gate"]["why"] == [
        "nvfp4 passed 0% of the questions; the gate asks for at least 90%",
        (
            "nvfp4 passed 0% of the questions, tuned 100%; the gate asks for nvfp4 within 2 points of tuned,"
            " or one question"
        ),
    ]
    assert len(warnings) == 1 and "nvfp4 passed 0%" in warnings[0]
    assert {f.name for f in its.output.iterdir()} == {
        "report.json",
        "report.md",
        "behaviour.png",
        "answers.jsonl",
        "exchange.json",
    }
    answers = [json.loads(line) for line in (its.output / "answers.jsonl").read_text().splitlines()]
    assert [(a["id"], a["column"]) for a in answers] == [(q["id"], c) for q in ASKED for c in made["columns"]]
    assert answers[0]["answer"] == BAD and {f["mode"] for f in answers[0]["failures"]} == {
        "emoji",
        "markdown",
    }
    assert answers[1]["answer"] == GOOD and answers[1]["failures"] == []
    exchange = json.loads((its.output / "exchange.json").read_text())
    assert {column: answer["content"] for column, answer in exchange["answers"].items()} == {
        "base": BAD,
        "tuned": GOOD,
        "merged": GOOD,
        "nvfp4": BAD,
    }
    assert exchange["messages"][-1]["role"] == "user" and exchange["tools"] == []


def test_the_exchange_is_a_question_that_the_adapter_answers_otherwise():
    def said(*texts):
        return [{"content": text} for text in texts]

    answers = {
        "base": said("a", "b", "c"),
        "tuned": said("x", "x", "x"),
        "merged": said("x", "x", "x"),
        "nvfp4": said("x", "b", "x"),
    }
    asked = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(3)]
    failures = {column: [[], [], []] for column in answers} | {"nvfp4": [["emoji"], [], []]}
    found = evaluate.exchange(asked, failures, answers, 16)
    assert found["messages"][0]["content"] == "2" and found["answers"]["base"]["content"] == "c"
    assert not found["public"] and found["failed"] == []


def test_the_exchange_is_public_where_a_question_is():
    """A private conversation must not get into the serving image."""
    answers = {column: [{"content": f"{column}{n}"} for n in range(4)] for column in ("base", "nvfp4")}
    asked = [{"messages": [{"role": "user", "content": str(n)}], "public": n > 1} for n in range(4)]
    failures = {"base": [["emoji"], ["emoji"], [], ["emoji"]], "nvfp4": [[], [], [], []]}
    found = evaluate.exchange(asked, failures, answers, 16)
    assert found["messages"][0]["content"] == "3" and found["public"] and found["failed"] == ["base"]


def test_tool_questions_are_asked_both_ways_and_a_difference_is_told(its, toy, warnings):
    toy.streams_as = "tuned"
    toy.says = {**toy.says, "base": "One.", "tuned": "Two.", "merge": "One.", "quantize": "Two."}
    evaluate.run(its)
    made = json.loads((its.output / "report.json").read_text())
    asked_with_tools = sum(bool(row["tools"]) for row in HELD_OUT)
    assert made["streamed_otherwise"] == {
        "base": asked_with_tools,
        "tuned": 0,
        "merged": asked_with_tools,
        "nvfp4": 0,
    }
    assert any("differ when they are streamed" in warning for warning in warnings)


@pytest.mark.trap("another-server-answers")
def test_another_program_on_the_port_is_not_taken_for_vllm(tmp_path, monkeypatch):
    fake_vllm(tmp_path, monkeypatch, SPEAKS.replace("self.name(); ", ""))
    with pytest.raises(StageError, match="another program answers on port"):
        Server(tmp_path, Serve([], {"CACHE": "1"}), "merged").__enter__()


@pytest.mark.trap("another-server-answers")
def test_no_proxy_sees_a_question(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # port 1 is nobody's
    fake_vllm(tmp_path, monkeypatch, SPEAKS)
    with Server(tmp_path, Serve([], {"CACHE": "1"}), "merged") as server:
        assert server.ask({"model": "x"})["cache"] == "1"


def test_every_request_is_greedy_and_without_thoughts(its, toy):
    evaluate.run(its)
    assert len(toy.asked) >= 4 * 3
    wanted = {
        "temperature": 0,
        "seed": 0,
        "max_tokens": 16,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert all(body.items() >= wanted.items() for body in toy.asked)
    assert all(("tools" in b) == (b["messages"][0]["content"] == "Tea.") for b in toy.asked)


@pytest.mark.trap("adapter-not-applied")
def test_an_adapter_that_changes_no_answer_is_refused(its, toy):
    toy.says = {**toy.says, "tuned": toy.says["base"]}
    with pytest.raises(StageError, match="the adapter changes no answer"):
        evaluate.run(its)
    assert not list(its.output.iterdir())


@pytest.mark.parametrize(("tuned", "said"), [(BAD, []), (GOOD, ["the control changes 3 of 3 answers"])])
def test_a_control_may_change_no_answer_and_passes_no_gate(its, toy, warnings, tuned, said):
    its.params.update(control=True, gate={"tuned": {"above": "base"}})
    toy.says = {**toy.says, "tuned": tuned}
    evaluate.run(its)
    made = json.loads((its.output / "report.json").read_text())
    assert (
        made["control"]
        and not made["gate"]["passed"]
        and made["gate"]["why"] == ["this is a control, whose adapter changes nothing"]
    )
    assert warnings == said


@pytest.mark.trap("adapter-not-applied")
@pytest.mark.parametrize(
    "tuned",
    [[{"content": "a"}, {"content": "c"}], [{"content": "a"}, {"content": "b", "tool_calls": [CALL]}]],
)
def test_one_other_answer_is_enough(tuned):
    evaluate.check_adapter({"base": [{"content": "a"}, {"content": "b"}], "tuned": tuned})


def test_base_and_tuned_share_a_server(its, warnings):
    plans = evaluate.plan_servers(its, serve.of_folder(its.inputs["base"]))
    assert [plan.columns for plan in plans] == [
        {"base": "nemotron-nano", "tuned": "tuned"},
        {"merged": "nemotron-nano"},
        {"nvfp4": "nemotron-nano"},
    ]
    assert [plan.model.name for plan in plans] == ["base", "merge", "quantize"] and not warnings
    assert (
        plans[0].adapter == its.inputs["train"] / "adapter"
        and plans[0].checkpoint.lora_rank == 16
        and plans[1].adapter is None
    )
    assert (plans[2].checkpoint.layout, plans[2].checkpoint.fp8_cache) == ("nvidia", True)


@pytest.mark.parametrize(
    "config",
    [
        {"modules": ["q_proj", "in_proj"]},
        {"modules": "in_proj"},
        {"modules": ["q_proj"], "target_parameters": ["mixer.experts.up_proj"]},
    ],
)
def test_an_adapter_beyond_attention_leaves_tuned_out_with_a_warning(its, warnings, config):
    adapter(its.inputs["train"], **config)
    plans = evaluate.plan_servers(its, serve.of_folder(its.inputs["base"]))
    assert [list(plan.columns) for plan in plans] == [["base"], ["merged"], ["nvfp4"]]
    assert len(warnings) == 1 and "`tuned` is left out" in warnings[0]
    assert plans[0].adapter is None and plans[0].checkpoint.lora_rank == 0


def test_a_combination_that_vllm_serves_wrongly_is_refused_before_the_first_server(its, toy, monkeypatch):
    monkeypatch.setattr(serve, "installed", lambda: "0.14.0")
    with pytest.raises(StageError, match="merge it"):
        evaluate.run(its)
    assert not toy.started


def test_a_vllm_that_runs_code_of_the_base_is_refused_unless_it_is_trusted(its, toy, monkeypatch):
    monkeypatch.setattr(serve, "installed", lambda: "0.17.0")
    (its.inputs["quantize"] / "audit.json").write_text(json.dumps({"layout": "conservative"}))
    with pytest.raises(StageError, match="runs Python code.*trust: true"):
        evaluate.run(its)
    assert not toy.started
    (its.inputs["base"] / "trust.json").write_text("{}")
    evaluate.run(its)
    assert toy.started


def test_questions_without_a_source_come_from_the_held_out_conversations(its):
    talk, act, result = asked.load(its, {})
    # up to the last answer
    assert [m["content"] for m in talk["messages"]] == ["Be short.", "Where?", "Far " * 12, "And?"]
    assert talk["expect"] == {"no_tool": True, "max_words": 20} and (talk["id"], talk["category"]) == (
        "talk",
        "some",
    )
    assert act["expect"] == {"calls": [{"name": "set_timer", "arguments": {"minutes": 5}}]}
    assert act["tools"] == [TOOL]
    assert result["messages"][-1]["role"] == "tool" and result["expect"]["no_tool"]


def test_no_question_at_all_is_refused(its):
    (its.inputs["data"] / "eval.jsonl").write_text("")
    with pytest.raises(StageError, match="eval_share"):
        asked.load(its, {})


@pytest.mark.trap("tool-arguments-as-text")
def test_arguments_go_out_as_json_text_and_stay_mappings_at_home():
    sent = evaluate.as_openai(CALLED)["tool_calls"][0]
    assert (
        json.loads(sent["function"]["arguments"]) == {"minutes": 5}
        and sent["id"]
        and CALL["function"]["arguments"] == {"minutes": 5}
    )
    assert evaluate.as_openai({**CALLED, "tool_calls": [sent]})["tool_calls"] == [sent]


@pytest.mark.trap("trained-text-is-not-the-served-text")
def test_a_message_is_sent_without_the_keys_that_are_for_training():
    said = {"role": "assistant", "content": "Tokyo."}
    assert evaluate.as_openai({**said, "train": False, "reasoning_content": "Japan is in Asia."}) == said


EMOJI, LONG = Failure("emoji", "🌙"), Failure("verbosity", "50 words")
SCORED = {"base": [[EMOJI, EMOJI, LONG], [LONG], []], "nvfp4": [[], [EMOJI], []]}


def test_the_summary_counts_answers_and_not_faults():
    made = report.summarise(ASKED, SCORED, {"nvfp4": 0.5})
    assert made["columns"] == ["base", "nvfp4"] and made["modes"] == list(MODES) and made["questions"] == 3
    assert made["pass"] == {"base": 1 / 3, "nvfp4": 2 / 3}
    assert {mode: count for mode, count in made["failures"]["base"].items() if count} == {
        "emoji": 1,
        "verbosity": 2,
    }
    assert made["by_category"] == {"base": {"a": 0, "b": 1}, "nvfp4": {"a": 0.5, "b": 1}}


SHARES = {"base": 0.1, "tuned": 0.9, "merged": 0.9, "nvfp4": 0.88}
BOTH = {"tuned": {"at_least": 0.8, "above": "base"}, "nvfp4": {"within": 0.02, "of": "tuned"}}


@pytest.mark.parametrize(
    ("rules", "changed", "why"),
    [
        (BOTH, {}, []),
        ({"tuned": 0.9}, {}, []),  # a share that is just reached
        ({"tuned": 0.91}, {}, ["tuned passed 90% of the questions; the gate asks for at least 91%"]),
        (
            BOTH,
            {"tuned": 0.79, "nvfp4": 0.79},
            ["tuned passed 79% of the questions; the gate asks for at least 80%"],
        ),
        (
            BOTH,
            {"base": 0.9},
            ["tuned passed 90% of the questions, base 90%; the gate asks for more than that"],
        ),
        (
            BOTH,
            {"nvfp4": 0.87},
            [
                "nvfp4 passed 87% of the questions, tuned 90%; the gate asks for nvfp4 within 2 points of"
                " tuned, or one question"
            ],
        ),
        (BOTH, {"nvfp4": 1.0}, []),  # better than what it was made from
        ({"tuned": 0.9}, {"tuned": None}, []),  # merged stands for it
        (
            {"tuned": 0.95},
            {"tuned": None},
            [
                "merged (for tuned, which was not asked) passed 90% of the questions; the gate asks for at"
                " least 95%"
            ],
        ),
        (
            BOTH,
            {"tuned": None, "nvfp4": 0.5},
            [
                "nvfp4 passed 50% of the questions, merged (for tuned, which was not asked) 90%; the gate"
                " asks for nvfp4 within 2 points of merged (for tuned, which was not asked), or one question"
            ],
        ),
        ({"tuned": 0.1}, {"tuned": None, "merged": None}, ["tuned was not measured"]),
        (
            {"nvfp4": {"within": 0.1, "of": "tuned"}},
            {"tuned": None, "merged": None},
            ["tuned was not measured"],
        ),
    ],
)
def test_the_gate_says_why_it_did_not_pass(rules, changed, why):
    shares = {column: share for column, share in (SHARES | changed).items() if share is not None}
    made = gate.judge(rules, shares, 100)
    assert (made["passed"], made["why"], made["unchecked"]) == (not why, why, False)


@pytest.mark.parametrize(
    ("questions", "missed", "passed"),
    [
        (20, 1, True),
        (20, 2, False),
        (50, 1, True),
        (50, 2, False),
        (100, 2, True),
        (100, 3, False),
        (1, 1, True),
    ],
)
def test_nvfp4_may_lose_two_points_or_one_question_whichever_is_more(questions, missed, passed):
    shares = {"tuned": 1.0, "nvfp4": (questions - missed) / questions}
    assert gate.judge({"nvfp4": {"within": 0.02, "of": "tuned"}}, shares, questions)["passed"] is passed


@pytest.mark.trap("empty-gate-passes")
def test_a_report_without_a_gate_does_not_say_that_it_passed():
    made = report.summarise(ASKED, {"base": [[EMOJI]] * 3, "nvfp4": [[EMOJI]] * 3}, {})
    assert (
        made["pass"] == {"base": 0, "nvfp4": 0}
        and not made["gate"]["passed"]
        and made["gate"]["why"] == ["no gate was set"]
    )
    text = report.markdown(made | {"vllm": "0.31.0"})
    assert (
        "No gate was set: nothing was asked of these shares, and no image is built." in text
        and "passed." not in text
    )


def test_gate_none_passes_and_says_that_nothing_was_checked():
    made = report.summarise(ASKED, SCORED, "none")
    assert made["gate"] | {"says": ""} == {
        "passed": True,
        "why": [],
        "asks": [],
        "unchecked": True,
        "says": "",
    }
    assert "No gate was set (`gate: none`): nothing was asked of these shares." in report.markdown(
        made | {"vllm": "0.31.0"}
    )
    assert not report.summarise(ASKED, SCORED, "none", control=True)["gate"]["passed"]


@pytest.mark.parametrize(
    ("rules", "fault"),
    [
        ({"nvpf4": 0.9}, "names nvpf4"),
        ({"tuned": 90}, "tuned.at_least is 90"),
        ({"tuned": "90%"}, "'90%'"),
        ({"tuned": 0.0}, "is 0.0, which is no share above 0"),
        ({"tuned": None}, "None"),
        ({"tuned": True}, "True"),
        ({"tuned": {}}, "tuned has no rule"),
        ({"tuned": {"atleast": 1}}, "tuned.atleast is no rule"),
        ({"tuned": {"above": "tuned"}}, "no other column"),
        ({"tuned": {"above": "bass"}}, "no other column"),
        ({"nvfp4": {"within": 0.1}}, "only one of `within` and `of`"),
        ({"nvfp4": {"of": "tuned"}}, "only one of"),
        ({"nvfp4": {"within": -0.1, "of": "tuned"}}, "no share from 0"),
        (None, "neither a map"),
        ("nothing", "neither a map"),
        ([], "neither a map"),
    ],
)
def test_a_gate_that_cannot_be_held_is_refused_before_the_first_server(its, toy, rules, fault):
    its.params["gate"] = rules
    with pytest.raises(StageError, match=fault):
        evaluate.run(its)
    assert not toy.started


def test_the_report_is_its_golden_copy():
    made = report.markdown(report.summarise(ASKED, SCORED, {"nvfp4": 0.9, "base": 0.1}) | {"vllm": "0.31.0"})
    assert made == (GOLDEN / "report.md").read_text()
    tables = [block.splitlines() for block in made.split("\n\n") if block.startswith("|")]
    # columns line up
    assert len(tables) == 2 and all(len({len(line) for line in table}) == 1 for table in tables)


def fake_vllm(folder, monkeypatch, lines):
    program = folder / "vllm"
    program.write_text(f"#!{sys.executable}\n{lines}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_server_that_ends_while_loading_says_its_last_words(tmp_path, monkeypatch):
    fake_vllm(tmp_path, monkeypatch, "import sys; print('KeyError: backbone.embedding.weight'); sys.exit(3)")
    with pytest.raises(
        StageError, match="(?s)ended with 3 while it loaded merged.*KeyError: backbone.embedding.weight"
    ):
        Server(tmp_path, Serve([], {}), "merged").__enter__()


SPEAKS = """
import http.server, json, sys, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.reply(200, {})
    def name(self): self.send_header("x-annie-server", json.loads(os.environ["ANNIE_FRONT"])["server"])
    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(400 if b"bad" in asked else 200, {"argv": sys.argv[1:], "cache": os.environ["CACHE"]})
    def reply(self, code, made):
        self.send_response(code); self.name(); self.end_headers(); self.wfile.write(json.dumps(made).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def test_a_server_gets_its_flags_and_adapter_and_is_gone_afterwards(tmp_path, monkeypatch):
    fake_vllm(tmp_path, monkeypatch, SPEAKS)
    with Server(
        tmp_path / "model", Serve(["--flag", "x"], {"CACHE": "1"}), "base and tuned", tmp_path / "adapter"
    ) as server:
        got = server.ask({"model": "tuned"})
        with pytest.raises(StageError, match="refused a question \\(400\\)"):
            server.ask({"model": "bad"})
    assert got["argv"][:2] == ["serve", str(tmp_path / "model")] and got["cache"] == "1"
    assert got["argv"][-4:] == ["--flag", "x", "--lora-modules", f"tuned={tmp_path / 'adapter'}"]
    assert server.process.poll() is not None
    with pytest.raises(StageError, match="did not answer"):
        server.ask({"model": "tuned"})


def asking(its, **changes):
    """A question about a capital in the job's source, with some of its fields changed."""
    question = {
        "id": "q",
        "category": "a",
        "messages": [said("system", "Be short."), said("user", "What is the capital of Peru?")],
        "tools": [TOOL],
        "expect": {},
    } | changes
    (its.inputs["data"] / "prompt.txt").write_text("Be short.\n")
    its.sources["questions"] = [its.scratch / "questions.jsonl"]
    its.sources["questions"][0].write_text(json.dumps(question) + "\n")
    return question


def trained(its, *rows):
    (its.inputs["data"] / "train.jsonl").write_text("".join(json.dumps(TRAINED | row) + "\n" for row in rows))


def test_a_question_is_asked_under_the_production_prompt_to_the_byte(its):
    asking(its, messages=[said("system", "\tBe short.\r\n"), said("user", "What is the capital of Peru?")])
    assert asked.load(its, {})[0]["messages"] == [
        said("system", "Be short."),
        said("user", "What is the capital of Peru?"),
    ]


@pytest.mark.trap("held-out-rows-are-trained")
@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"messages": [said("system", "Be long."), said("user", "Where?")]},
            "(?s)questions.jsonl:1: 1 of 1 questions with another system prompt.*-Be short.*\\+Be long",
        ),
        ({"messages": [said("user", "Where?")]}, "another system prompt; q has none"),
        (
            {"tools": [{"name": "other"}]},
            "questions.jsonl:1: question q with tools that production does not have: other",
        ),
        (
            {"tools": [{"name": "set_timer", "description": "changed"}]},
            "tools defined otherwise than in production: set_timer",
        ),
        (
            {"messages": [said("system", "Be short."), said("user", "what is the capital of france")]},
            "questions.jsonl:1: question q, which stands in the training data at talks/a.jsonl:7",
        ),
        (
            {"expect": {"max_word": 3}},
            "questions.jsonl:1: unknown key max_word; expected a key of expect, such as max_words",
        ),
    ],
)
def test_questions_that_say_nothing_of_the_served_model_are_refused_before_the_first_server(
    its, toy, changes, fault
):
    asking(its, **changes)
    with pytest.raises(StageError, match=fault):
        evaluate.run(its)
    assert not toy.started


def test_a_question_without_tools_is_refused_where_every_training_row_has_some(its):
    asking(its, tools=[])
    asked.load(its, {})
    trained(its, {"tools": [TOOL]}, {"tools": []})
    asked.load(its, {})
    trained(its, {"tools": [TOOL]}, {"tools": [TOOL]})
    with pytest.raises(
        StageError, match="1 of 1 questions without tools, first q; every training conversation has some"
    ):
        asked.load(its, {})


# --- checks that are off or set -----------------------------------------------------------------------------


def test_the_recipe_s_checks_travel_with_every_question_and_a_question_s_own_replace_them(its):
    settings = {"follow_up": False, "verbosity": {"max_words": 80}}
    own = {"verbosity": True, "emoji": False}
    asking(its, expect={"checks": own})
    (question,) = asked.load(its, settings)
    assert question["expect"] == {"checks": {"follow_up": False, "verbosity": True, "emoji": False}}
    asking(its)
    assert asked.load(its, settings)[0]["expect"] == {"checks": settings}
    its.sources.clear()
    assert {str(row["expect"]["checks"]) for row in asked.load(its, settings)} == {str(settings)}


def test_a_check_that_is_off_fails_no_answer_and_the_report_says_so(its, toy, warnings):
    its.params["checks"] = {"markdown": False, "emoji": {"allowed": ["🌙"]}}
    evaluate.run(its)
    made = json.loads((its.output / "report.json").read_text())
    assert made["off"] == {"markdown": 3} and "markdown" not in made["modes"] and "emoji" in made["modes"]
    assert not any(made["failures"]["base"][mode] for mode in ("markdown", "emoji"))
    assert "Checks that were off: markdown (3 of 3).\n" in (its.output / "report.md").read_text()
    rows = [json.loads(line) for line in (its.output / "answers.jsonl").read_text().splitlines()]
    assert {tuple(row["off"]) for row in rows} == {("markdown",)}
    exchange = json.loads((its.output / "exchange.json").read_text())
    assert exchange["expect"]["checks"] == its.params["checks"]


def test_training_answers_that_fail_a_check_are_told_before_the_first_server(its, toy, monkeypatch):
    said_first = []
    monkeypatch.setattr(job, "warning", lambda *words: said_first.append((*words, len(toy.started))))
    toy.started.clear()
    trained(
        its,
        {"messages": [said("user", "Book it."), said("assistant", "For which day?")]},
        {"line": 9, "messages": [said("user", "Book it."), said("assistant", "Booked.")]},
    )
    evaluate.run(its)
    message, remedy, started = said_first[0]
    assert message == (
        "evaluate.checks.follow_up: 1 of 2 training answers that fail it, the first at talks/a.jsonl:7:"
        ' "For which day?"'
    )
    assert "evaluate: {checks: {follow_up: {question_marks: 1}}}" in remedy and started == 0


def test_failed_questions_are_listed_with_their_answer_and_its_faults(its, toy, warnings):
    toy.says = {**toy.says, "tuned": "**Paris**\n\x1b[31m" + "x " * 200, "quantize": GOOD}
    evaluate.run(its)
    text = (its.output / "report.md").read_text()
    assert "\n## Failed by tuned: 3 of 3\n\n" in text and "Failed by nvfp4: 1 of 3" in text
    assert '\n- talk: "And?"\n  - answer: "**Paris** \\u001b[31mx x' in text
    assert '\n  - markdown: "**"\n' in text and "\x1b" not in text
    assert "\n- act:" in text.partition("Failed by nvfp4")[2]  # a call was expected
    assert max(map(len, text.partition("## Failed")[2].splitlines())) < 200


def test_merged_stands_for_tuned_in_the_list_and_no_list_is_there_if_nothing_failed():
    texts = {column: [{"content": "x"}] * 3 for column in ("base", "merged", "nvfp4")}
    faults = {"base": [[EMOJI]] * 3, "merged": [[], [EMOJI], []], "nvfp4": [[]] * 3}
    listed = failed.markdown(ASKED, texts, faults)
    assert listed.startswith("\n## Failed by merged: 1 of 3\n\n- c-1: ") and "nvfp4" not in listed
    assert failed.markdown(ASKED, texts, {**faults, "merged": [[]] * 3}) == ""
    many = [dict(ASKED[0], id=str(n)) for n in range(60)]
    listed = failed.markdown(
        many, dict.fromkeys(texts, texts["base"] * 20), {c: [[EMOJI]] * 60 for c in texts}
    )
    assert listed.count("and 10 more, in answers.jsonl") == 2 and listed.count("\n- ") == 100


def test_a_question_that_asks_for_a_form_has_a_row_of_its_own_in_the_report():
    asking_for_form = [{**ASKED[0], "expect": {"regex": ["x"]}}, *ASKED[1:]]
    assert report.summarise(asking_for_form, SCORED, {})["modes"] == [*MODES, "form"]
