"""The serving artifact: flags, prompt, tools and model card, and only of a model that passed the gate."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import stages
from model.families import serve
from model.weights import origin
from model.weights.origin import Origin
from model.weights.paths import CheckpointError
from stages.job import Job, StageError
from stages.package import package

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PARAMS = {
    "serves": "nvfp4",
    "max_model_len": 2048,
    "max_num_seqs": 4,
    "memory_share": 0.35,
    "kv_cache": "auto",
    "max_waiting": 32,
    "max_choices": 8,
    "default_prompt": "insert",
    "served_name": "nemotron-nano",
    "service": "vllm-nemotron-annie",
    "assistant": "Annie",
}
COLUMNS = ("base", "tuned", "merged", "nvfp4")
GATE = {
    "passed": True,
    "why": [],
    "unchecked": False,
    "asks": ["tuned at least 80%", "tuned above base", "nvfp4 within 2 points of tuned, or one question"],
    "says": (
        "The gate passed: tuned at least 80%; tuned above base; nvfp4 within 2 points of tuned, or one"
        " question."
    ),
}
REPORT = {
    "columns": COLUMNS,
    "modes": ["emoji", "follow_up"],
    "off": {},
    "questions": 50,
    "pass": dict(zip(COLUMNS, (0.0, 0.94, 0.94, 0.9), strict=False)),
    "failures": {
        column: {"emoji": n, "follow_up": 2 * n} for column, n in zip(COLUMNS, (25, 1, 1, 2), strict=False)
    },
    "gate": GATE,
}
EXCHANGE = {
    "messages": [{"role": "user", "content": "Name the capital of France."}],
    "tools": [],
    "max_tokens": 48,
    "expect": {"must_say": ["Paris"]},
    "public": True,
    "failed": ["base"],
    "answers": {
        column: {"content": "Paris." if column != "base" else "Sure! **Paris** 🎉", "tool_calls": []}
        for column in COLUMNS
    },
}
STATS = {"train": 323, "eval": 36, "tokens": 102048, "trained_tokens": 7287}
TRAINING = {
    "method": "lora",
    "targets": "attention",
    "rank": 12,
    "alpha": 24.0,
    "steps": 120,
    "kept_step": 110,
    "epochs": 2.97,
    "trainable": 57344,
    "parameters": 1380388,
}
ORIGIN = Origin("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 4 * "0123456789")
BASE_CARD = """\
---
license: other
license_name: nvidia-open-model-license
license_link: >-
  LICENSE
library_name: transformers
---
# The base
"""
PROVENANCE = {
    name: {"stage": name, "key": 5 * f"{name[0]}0123456789", "digest": 4 * f"{n}123456789abcdef"}
    for n, name in enumerate(("quantize", "evaluate", "data"))
}


@pytest.fixture
def its(tmp_path, monkeypatch):
    inputs = {name: tmp_path / name for name in ("base", "train", "merge", "quantize", "evaluate", "data")}
    for folder in [*inputs.values(), tmp_path / "output"]:
        folder.mkdir()
    (inputs["base"] / "config.json").write_text('{"model_type": "nemotron_h"}')
    added = [{"id": 12, "content": "<think>"}, {"id": 14, "content": "<tool_call>"}]
    (inputs["base"] / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (inputs["evaluate"] / "report.json").write_text(json.dumps(REPORT))
    (inputs["quantize"] / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}})
    )
    (inputs["quantize"] / "audit.json").write_text(json.dumps({"layout": "nvidia"}))
    (inputs["evaluate"] / "exchange.json").write_text(json.dumps(EXCHANGE))
    (inputs["train"] / "adapter").mkdir()
    (inputs["train"] / "adapter/adapter_config.json").write_text(
        json.dumps({"r": 12, "target_modules": ["q_proj", "o_proj"]})
    )
    (inputs["data"] / "prompt.txt").write_text("You are Annie.\nನಮಸ್ಕಾರ\n")
    (inputs["data"] / "tools.json").write_text('[{"type": "function"}]\n')
    (inputs["data"] / "stats.json").write_text(json.dumps(STATS))
    (inputs["train"] / "training.json").write_text(json.dumps(TRAINING))
    monkeypatch.setattr(serve, "installed", lambda: "0.31.0")
    return Job(
        "package",
        dict(PARAMS),
        inputs,
        tmp_path / "output",
        tmp_path,
        0,
        device="cuda",
        provenance=PROVENANCE,
    )


def on_cpu(its):
    return Job(**{**vars(its), "device": "cpu"})


def test_a_vllm_that_runs_code_of_the_base_is_refused_unless_it_is_trusted(its, monkeypatch):
    monkeypatch.setattr(serve, "installed", lambda: "0.17.0")
    (its.inputs["quantize"] / "audit.json").write_text(json.dumps({"layout": "conservative"}))
    with pytest.raises(StageError, match="runs Python code.*trust: true"):
        package.run(its)
    (its.inputs["base"] / "trust.json").write_text("{}")
    package.run(its)
    assert "--trust-remote-code" in json.loads((its.output / "serve.json").read_text())["args"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_serve_json_is_its_golden_copy(its, device):
    package.run(its if device == "cuda" else on_cpu(its))
    assert (its.output / "serve.json").read_text() == (GOLDEN / f"serve.{device}.json").read_text()


def test_the_model_card_is_its_golden_copy(its):
    origin.write(its.inputs["base"], ORIGIN)
    (its.inputs["base"] / "README.md").write_text(BASE_CARD)
    package.run(its)
    assert (its.output / "README.md").read_text() == (GOLDEN / "serving-card.md").read_text()


def card(its):
    """The card's YAML head, and its text."""
    package.run(its)
    _, head, text = (its.output / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_of_a_base_without_a_repository_says_so(its):
    its.params.update(serves="tuned", default_prompt="none")
    its.params.update(served_name="boat", assistant="Bob", service="vllm-Boat")
    head, text = card(its)
    assert head == {
        "library_name": "vllm",
        "pipeline_tag": "text-generation",
        "tags": ["nemotron_h", "lora", "bf16", "conversational"],
    }
    for said in (
        "# boat: a NemotronH, fine-tuned into Bob",
        "of no repository",
        "up -d vllm-boat\n",
        '"model": "boat"',
        "Send both.",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        (
            "---\nlicense: mit\nlicense_link: https://a/b\n---\n",
            {"license": "mit", "license_link": "https://a/b"},
        ),
        ("---\nlicense: [a]\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("# No head\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("", {}),
    ],
)
def test_the_licence_is_what_the_bases_head_says(its, text, licence):
    origin.write(its.inputs["base"], ORIGIN)
    (its.inputs["base"] / "README.md").write_text(text)
    head, _ = card(its)
    assert head["base_model"] == ORIGIN.repository and head["base_model_relation"] == "finetune"
    assert {name: value for name, value in head.items() if name.startswith("license")} == licence


def test_a_head_that_is_no_yaml_is_warned_of(its, monkeypatch):
    warned = []
    monkeypatch.setattr(package.job, "warning", lambda message, remedy="": warned.append(message))
    (its.inputs["base"] / "README.md").write_text("---\nlicense: [\n---\n")
    head, _ = card(its)
    assert "license" not in head and "no YAML" in warned[0]


def test_an_origin_that_is_none_is_refused(its):
    (its.inputs["base"] / "origin.json").write_text('{"repository": "a/b: c", "commit": "main"}')
    with pytest.raises(CheckpointError, match="origin.json with repository"):
        package.run(its)


def test_the_artifact_holds_what_the_formats_say(its):
    package.run(its)
    assert {f.name for f in its.output.iterdir()} == {
        "serve.json",
        "check.json",
        "prompt.txt",
        "tools.json",
        "README.md",
        "server",
    }
    described = json.loads((its.output / "serve.json").read_text())
    assert set(described) == {
        "served_name",
        "service",
        "assistant",
        "serves",
        "vllm",
        "device",
        "args",
        "env",
        "port",
        "chat_template_kwargs",
        "front",
        "memory_gb",
    }
    assert all(
        (its.output / name).read_bytes() == (its.inputs["data"] / name).read_bytes()
        for name in ("prompt.txt", "tools.json")
    )


def test_the_type_serving_lists_every_file_of_the_artifact(its):
    package.run(its)
    types = tomllib.loads((Path(stages.__file__).parent / "artifacts.toml").read_text())
    files = (path for path in its.output.rglob("*") if path.is_file())
    assert {str(path.relative_to(its.output)) for path in files} == set(types["serving"])


@pytest.mark.trap("think-block-disagrees")
def test_clients_are_told_that_thinking_is_off(its, monkeypatch):
    monkeypatch.setattr(serve, "installed", lambda: "0.12.0")  # no flag for it there
    (its.inputs["base"] / "trust.json").write_text("{}")
    (its.inputs["quantize"] / "audit.json").write_text(json.dumps({"layout": "conservative"}))
    package.run(its)
    described = json.loads((its.output / "serve.json").read_text())
    assert (
        described["chat_template_kwargs"] == {"enable_thinking": False}
        and "--default-chat-template-kwargs" not in described["args"]
    )


def said(its):
    """The KV cache that serve.json names."""
    package.run(its)
    args = json.loads((its.output / "serve.json").read_text())["args"]
    return args[args.index("--kv-cache-dtype") + 1]


@pytest.mark.trap("kv-cache-dtype-ignored")
def test_the_fp8_cache_follows_the_checkpoint(its):
    (its.inputs["quantize"] / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None}})
    )
    assert said(its) == "bfloat16"


@pytest.mark.trap("in-proj-on-old-vllm")
def test_a_layout_that_this_vllm_reads_wrongly_is_refused(its, monkeypatch):
    monkeypatch.setattr(serve, "installed", lambda: "0.17.1")
    with pytest.raises(StageError, match="layout: conservative"):
        package.run(its)
    assert not list(its.output.iterdir())


def test_a_gate_that_did_not_pass_stops_the_image_and_says_why(its):
    why = ["nvfp4 passed 60% of the questions, at least 90% are wanted", "tuned was not measured"]
    (its.inputs["evaluate"] / "report.json").write_text(
        json.dumps({**REPORT, "gate": {**GATE, "passed": False, "why": why}})
    )
    with pytest.raises(StageError, match="nvfp4 passed 60% .* tuned was not measured"):
        package.run(its)
    assert not list(its.output.iterdir())


@pytest.mark.trap("empty-gate-passes")
@pytest.mark.parametrize("changed", [{"passed": False, "why": ["no gate was set"], "asks": []}, {"asks": []}])
def test_a_report_that_was_asked_nothing_gets_no_image(its, changed):
    (its.inputs["evaluate"] / "report.json").write_text(json.dumps({**REPORT, "gate": {**GATE, **changed}}))
    with pytest.raises(
        StageError, match="(no gate was set|it asks nothing).*gate: none builds an image unchecked"
    ):
        package.run(its)
    assert not list(its.output.iterdir())


def test_gate_none_builds_an_image_whose_card_says_that_nothing_was_checked(its, monkeypatch):
    warned = []
    monkeypatch.setattr(package.job, "warning", lambda message, remedy="": warned.append(message))
    says = "No gate was set (`gate: none`): nothing was asked of these shares."
    (its.inputs["evaluate"] / "report.json").write_text(
        json.dumps(
            {**REPORT, "gate": {"passed": True, "why": [], "asks": [], "unchecked": True, "says": says}}
        )
    )
    package.run(its)
    assert says in (its.output / "README.md").read_text() and warned == [says]


def test_merged_is_served_as_bf16(its):
    its.params["serves"] = "merged"
    package.run(its)
    described = json.loads((its.output / "serve.json").read_text())
    assert said(its) == "bfloat16" and described["args"][:2] == ["--served-model-name", "nemotron-nano"]
    assert "in BF16\n\nThe adapter merged" in (its.output / "README.md").read_text()


def test_an_adapter_at_run_time_has_the_name_that_clients_know(its):
    its.params["serves"] = "tuned"
    package.run(its)
    described = json.loads((its.output / "serve.json").read_text())
    assert described["served_name"] == "nemotron-nano" and described["args"][:2] == [
        "--served-model-name",
        "nemotron-nano-base",
    ]
    assert described["args"][described["args"].index("--max-lora-rank") + 1] == "16"
    assert "an adapter of rank 12" in (its.output / "README.md").read_text()


def test_an_adapter_that_vllm_cannot_add_is_refused(its):
    its.params["serves"] = "tuned"
    (its.inputs["train"] / "adapter/adapter_config.json").write_text(
        json.dumps({"r": 8, "target_modules": ["q_proj", "in_proj"]})
    )
    with pytest.raises(StageError, match="serves"):
        package.run(its)
    assert not list(its.output.iterdir())


@pytest.mark.parametrize("serves", ["nvfp4", "merged", "tuned"])
def test_the_check_is_a_question_that_the_adapter_answers(its, serves):
    its.params["serves"] = serves
    package.run(its)
    check = json.loads((its.output / "check.json").read_text())
    assert (
        check["base"] != check["expected"] == EXCHANGE["answers"][serves]
        and check["messages"] == EXCHANGE["messages"]
        and check["expect"] == EXCHANGE["expect"]
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"public": False}, 'no question of the evaluation is marked "public": true'),
        ({"failed": []}, "wrongly by the base"),
        ({"failed": ["base", "nvfp4"]}, "rightly by this model"),
    ],
)
def test_no_private_or_useless_question_gets_into_the_image(its, changes, why):
    (its.inputs["evaluate"] / "exchange.json").write_text(json.dumps({**EXCHANGE, **changes}))
    package.run(its)
    text = (its.output / "check.json").read_text()
    assert why in json.loads(text)["left_out"] and "capital of France" not in text


def test_the_list_of_failed_questions_stays_out_of_the_image(its):
    for name in ("report.md", "answers.jsonl"):
        (its.inputs["evaluate"] / name).write_text("the private words")
    private = {**EXCHANGE, "public": False, "messages": [{"role": "user", "content": "the private words"}]}
    (its.inputs["evaluate"] / "exchange.json").write_text(json.dumps(private))
    package.run(its)
    written = [path for path in its.output.rglob("*") if path.is_file()]
    assert written and not [path for path in written if b"private words" in path.read_bytes()]


def test_the_card_says_which_checks_were_off(its):
    (its.inputs["evaluate"] / "report.json").write_text(json.dumps(REPORT | {"off": {"emoji": 50}}))
    package.run(its)
    assert (
        "one question. Checks that were off: emoji (50 of 50).\n\n|" in (its.output / "README.md").read_text()
    )


def test_the_artifact_brings_the_programs_that_serve_it(its):
    """`--middleware server.front.Front` and the checks work from the artifact alone."""
    package.run(its)
    imports = "from stages.serving import front, supervisor, tool_calls; print(front.Front.__name__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", imports], cwd=its.output / "server", capture_output=True, text=True
    )
    assert done.stdout == "Front\n", done.stderr
    asked = {"question": {"expect": {"must_say": ["Paris"]}}, "answer": {"content": "**Rome**"}}
    done = subprocess.run(
        [sys.executable, "-E", "-S", "-B", "-m", "stages.serving.checks"],
        cwd=its.output / "server",
        input=json.dumps(asked),
        capture_output=True,
        text=True,
    )
    assert {failure["mode"] for failure in json.loads(done.stdout)} == {"markdown", "fabrication"}


@pytest.mark.trap("adapter-not-applied")
def test_a_model_that_answers_as_the_base_is_not_served(its):
    answers = EXCHANGE["answers"] | {"nvfp4": EXCHANGE["answers"]["base"]}
    (its.inputs["evaluate"] / "exchange.json").write_text(json.dumps({**EXCHANGE, "answers": answers}))
    with pytest.raises(StageError, match="as the base does"):
        package.run(its)
