"""Training on the small checkpoint with the real TRL and PEFT: what a run leaves behind, and what it refuses."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train environment")
pytest.importorskip("trl", reason="needs the train environment")
sys.path.insert(0, str(Path(__file__).parent))

import short  # noqa: E402
import small  # noqa: E402

from nemotron import native  # noqa: E402
from stages import job  # noqa: E402
from stages.train import fit  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return short.inputs(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    return short.watched(tmp_path_factory.mktemp("trained"), made)


def test_the_artifact_is_what_formats_md_says(trained):
    output = trained["task"].output
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert files == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "training.json", "loss.jsonl", "loss.png"}
    rows = [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"step", "train"}, {"step", "train", "held_out"}] * 2  # held out at eval_every = 2
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((output / "training.json").read_text())
    assert report["conversations"] == 8 and report["trained_tokens"] == 2 * sum(length + 1 for length in short.LENGTHS)
    assert report["loss"]["held_out"] == rows[-1]["held_out"] and report["loss"]["first"] == rows[0]["train"]
    assert report["trainable"] == sum(p.numel() for p in trained["start"].values()) == report["groups"]["adapter"]["trainable"]


def test_a_loss_that_is_no_number_stops_training_at_its_step(made, tmp_path, monkeypatch):
    params = {"learning_rate": 1e30, "eval_every": 99}  # step 1 is warm-up at a rate of zero, step 2 breaks the adapter
    with pytest.raises(job.StageError, match="loss is nan at step 3"):
        short.run(tmp_path / "stopped", made, **params)
    short.change_config(monkeypatch, logging_nan_inf_filter=True)
    with pytest.raises(job.StageError, match="held-out loss is nan at step 4"):
        short.run(tmp_path / "filtered", made, **params)  # transformers' own filter writes a loss of 0.0 at step 3, and goes on


def test_the_learning_rate_rises_and_then_falls_to_zero(made, tmp_path):
    task = short.task(tmp_path, made, steps=10, warmup_steps=3, save_every=10, eval_every=10)
    fit.run(task)
    rates = [row["learning_rate"] for row in short.logged(task) if "learning_rate" in row]
    assert rates[:4] == pytest.approx([0, 5e-3 / 3, 5e-3 * 2 / 3, 5e-3]) and rates[3:] == sorted(rates[3:], reverse=True)
    last = torch.load(task.scratch / "checkpoint-10" / "scheduler.pt", weights_only=True)["_last_lr"]
    assert last == pytest.approx([0.0] * len(last), abs=1e-9)


def test_the_adapter_s_config_holds_no_path_and_no_chance(made, trained, tmp_path):
    text = (trained["task"].output / "adapter" / "adapter_config.json").read_text()
    config = json.loads(text)
    assert str(made["base"].parent) not in text and config["base_model_name_or_path"] is None
    assert config["target_modules"] == sorted(native.PRESETS["all"]["target_modules"]) and config["r"] == 4 and config["lora_alpha"] == 8
    trained["model"].save_pretrained(tmp_path)
    assert str(made["base"]) in (tmp_path / "adapter_config.json").read_text(), "peft alone writes the path"


def test_one_seed_is_one_adapter(made, trained, tmp_path):
    task = trained["task"]
    again, other = (replace(task, output=tmp_path / f"{seed}" / "output", scratch=tmp_path / f"{seed}", seed=seed) for seed in (0, 1))
    for its in (again, other):
        its.output.mkdir(parents=True)
        fit.run(its)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again.output / "adapter" / name).read_bytes() == (task.output / "adapter" / name).read_bytes()
    assert all(not torch.equal(value, short.weights(task.output)[name]) for name, value in short.weights(other.output).items())


def test_gradient_checkpointing_trains_the_same_adapter(made, trained, tmp_path):
    output = short.run(tmp_path, made, gradient_checkpointing=True)
    assert all(torch.allclose(value, short.weights(trained["task"].output)[name], atol=1e-4) for name, value in short.weights(output).items())


def test_a_preset_that_matches_nothing_is_refused(made, tmp_path):
    without_experts = small.tokenizer(small.base(tmp_path / "base", "M*"))
    with pytest.raises(job.StageError, match="'experts' wants shared_experts.up_proj, which this model does not have"):
        short.run(tmp_path / "run", {**made, "base": without_experts}, targets="experts")


def test_a_data_set_without_rows_is_refused(made, tmp_path):
    (tmp_path / "eval.jsonl").touch()
    (tmp_path / "train.jsonl").write_bytes((made["data"] / "train.jsonl").read_bytes())
    with pytest.raises(job.StageError, match="eval.jsonl has no rows"):
        short.run(tmp_path / "run", {**made, "data": tmp_path})


def test_a_loss_that_falls_too_little_warns_or_fails(made, tmp_path, monkeypatch):
    warnings = short.warnings(monkeypatch)
    short.run(tmp_path / "warned", made, min_loss_drop=0.99)
    [warning] = warnings
    assert "the loss fell by" in warning and "wanted at least 99%" in warning
    with pytest.raises(job.StageError, match="the loss fell by .* expected at least 99%"):
        short.run(tmp_path / "failed", made, min_loss_drop=0.99, require_loss_drop=True)
