"""The serving artifact: flags, prompt, tools and model card, and only of a model that passed the gate."""

import json
from pathlib import Path

import pytest

from stages.image import image
from stages.job import Job, StageError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PARAMS = {"max_model_len": 2048, "max_num_seqs": 4, "memory_share": 0.35}
COLUMNS = ("base", "tuned", "merged", "nvfp4")
REPORT = {
    "columns": COLUMNS, "modes": ["emoji", "follow_up"], "questions": 50, "pass": dict(zip(COLUMNS, (0.0, 0.94, 0.94, 0.9))),
    "failures": {column: {"emoji": n, "follow_up": 2 * n} for column, n in zip(COLUMNS, (25, 1, 1, 2))}, "gate": {"passed": True, "why": []},
}
PROVENANCE = {
    name: {"stage": name, "key": 5 * f"{name[0]}0123456789", "digest": 4 * f"{n}123456789abcdef"} for n, name in enumerate(("quantize", "evaluate", "data"))
}


@pytest.fixture
def its(tmp_path, monkeypatch):
    inputs = {name: tmp_path / name for name in ("quantize", "evaluate", "data")}
    for folder in [*inputs.values(), tmp_path / "output"]:
        folder.mkdir()
    (inputs["evaluate"] / "report.json").write_text(json.dumps(REPORT))
    (inputs["quantize"] / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}))
    (inputs["quantize"] / "audit.json").write_text(json.dumps({"layout": "official"}))
    (inputs["data"] / "prompt.txt").write_text("You are Annie.\nನಮಸ್ಕಾರ\n")
    (inputs["data"] / "tools.json").write_text('[{"type": "function"}]\n')
    monkeypatch.setattr(image, "installed", lambda: "0.31.0")
    return Job("image", dict(PARAMS), inputs, tmp_path / "output", tmp_path, 0, device="cuda", provenance=PROVENANCE)


def on_cpu(its):
    return Job(**{**vars(its), "device": "cpu"})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_serve_json_is_its_golden_copy(its, device):
    image.run(its if device == "cuda" else on_cpu(its))
    assert (its.output / "serve.json").read_text() == (GOLDEN / f"serve.{device}.json").read_text()


def test_the_model_card_is_its_golden_copy(its):
    image.run(its)
    assert (its.output / "README.md").read_text() == (GOLDEN / "serving-card.md").read_text()


def test_the_artifact_holds_what_the_formats_say(its):
    image.run(its)
    assert {f.name for f in its.output.iterdir()} == {"serve.json", "prompt.txt", "tools.json", "README.md"}
    described = json.loads((its.output / "serve.json").read_text())
    assert set(described) == {"served_name", "vllm", "device", "args", "env", "port", "chat_template_kwargs"}
    assert all((its.output / name).read_bytes() == (its.inputs["data"] / name).read_bytes() for name in ("prompt.txt", "tools.json"))


def test_trap_15_clients_are_told_that_thinking_is_off(its, monkeypatch):
    monkeypatch.setattr(image, "installed", lambda: "0.12.0")  # no flag for it there
    (its.inputs["quantize"] / "audit.json").write_text(json.dumps({"layout": "conservative"}))
    image.run(its)
    described = json.loads((its.output / "serve.json").read_text())
    assert described["chat_template_kwargs"] == {"enable_thinking": False} and "--default-chat-template-kwargs" not in described["args"]


def test_trap_27_the_fp8_cache_follows_the_checkpoint(its):
    (its.inputs["quantize"] / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None}}))
    image.run(its)
    assert "--kv-cache-dtype" not in json.loads((its.output / "serve.json").read_text())["args"]


def test_trap_26_a_layout_that_this_vllm_reads_wrongly_is_refused(its, monkeypatch):
    monkeypatch.setattr(image, "installed", lambda: "0.17.1")
    with pytest.raises(StageError, match="layout: conservative"):
        image.run(its)
    assert not list(its.output.iterdir())


def test_a_gate_that_did_not_pass_stops_the_image_and_says_why(its):
    why = ["nvfp4 passed 60% of the questions, at least 90% are wanted", "tuned was not measured"]
    (its.inputs["evaluate"] / "report.json").write_text(json.dumps({**REPORT, "gate": {"passed": False, "why": why}}))
    with pytest.raises(StageError, match="nvfp4 passed 60% .* tuned was not measured"):
        image.run(its)
    assert not list(its.output.iterdir())
