"""Training on the small checkpoint: what a run leaves behind, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import contracts
import pytest
import short
import small
import torch

from model import adapter, assemble
from model.families.nemotron_h import targets
from model.weights.checkpoint import Checkpoint, Slot, write
from stages import job
from stages.train import fit, memory
from stages.train.board import FILE
from stages.train.loop import Loop, rate
from stages.train.pack import packs, trained_tokens
from stages.train.parameters import Parameters
from stages.train.ranks import Ranks
from stages.train.teacher import Teacher


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return short.inputs(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    return short.watched(tmp_path_factory.mktemp("trained"), made)


def test_the_artifact_is_what_formats_md_says(trained):
    output = trained["task"].output
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert files == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "training.json",
        "loss.jsonl",
        "loss.png",
        f"tensorboard/{FILE}",
    }
    rows = [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]
    always = {"step", "train", "norm", "learning_rate"}
    # held out before the first step, and at eval_every = 2
    assert [set(row) for row in rows] == [{"step", "held_out"}, *[always, always | {"held_out"}] * 2]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((output / "training.json").read_text())
    assert report["conversations"] == 8 and report["trained_tokens"] == 2 * sum(
        length + 1 for length in short.LENGTHS
    )
    held_out = short.losses(output, "held_out")
    assert report["loss"]["held_out"] == held_out[report["kept_step"]] == min(held_out.values())
    assert report["loss"]["held_out_base"] == held_out[0] and report["loss"]["held_out_last"] == held_out[4]
    assert report["loss"]["first"] == rows[1]["train"]
    assert report["verdict"].keys() == {"name", "says"}
    assert (
        report["trainable"]
        == sum(p.numel() for p in trained["start"].values())
        == report["groups"]["adapter"]["trainable"]
    )


def test_tensorboard_reads_every_loss_of_a_run_resumed_or_not(made, trained, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    task = trained["task"]
    shutil.copytree(
        task.scratch, tmp_path / "scratch", ignore=shutil.ignore_patterns("*-output", "checkpoint-4")
    )
    again = replace(task, scratch=tmp_path / "scratch", output=tmp_path / "output")
    again.output.mkdir()
    fit.run(again)
    read = EventAccumulator(str(again.output / "tensorboard")).Reload()
    for tag, key in (("loss/training", "train"), ("loss/held out", "held_out")):
        assert {event.step: event.value for event in read.Scalars(tag)} == pytest.approx(
            short.losses(task.output, key)
        )
    assert (again.output / "tensorboard" / FILE).read_bytes() == (
        task.output / "tensorboard" / FILE
    ).read_bytes()


def test_a_loss_that_is_no_number_stops_training_and_names_the_first_module(made, tmp_path):
    with pytest.raises(
        job.StageError,
        match=r"loss is nan at step 2, first in model\.layers\.0\.mixer\.out_proj; expected a finite loss",
    ):
        short.run(tmp_path / "stopped", made, learning_rate=1e30)


def test_a_gradient_that_is_no_number_stops_training_by_name(made, tmp_path, monkeypatch):
    def break_one(model):
        next(p for name, p in model.named_parameters() if name.endswith("q_proj.lora_b")).register_hook(
            lambda g: g * float("nan")
        )

    short.change_model(monkeypatch, break_one)
    with pytest.raises(
        job.StageError,
        match=r"the gradient of model\.layers\.3\.mixer\.q_proj\.lora_b is not finite at step 1",
    ):
        short.run(tmp_path, made)


def test_a_held_out_loss_that_is_no_number_stops_training(made, tmp_path, monkeypatch):
    right = Loop.loss
    monkeypatch.setattr(
        Loop, "loss", lambda self, pack: right(self, pack) * (1 if self.model.training else float("nan"))
    )
    with pytest.raises(job.StageError, match="held-out loss is nan at step 0"):
        short.run(tmp_path, made)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_run_of_no_steps_leaves_the_adapter_as_it_begins_and_measures_the_base(
    made, tmp_path, monkeypatch, targets
):
    warned = short.warnings(monkeypatch)
    output = short.run(tmp_path, made, steps=0, targets=targets, min_loss_drop=0.75, require_loss_drop=True)
    assert {name: bool(value.any()) for name, value in short.weights(output).items()} == {
        name: "lora_A" in name for name in short.weights(output)
    }
    report = json.loads((output / "training.json").read_text())
    assert (report["steps"], report["kept_step"]) == (0, 0) and report["loss"]["drop"] is None and not warned
    assert report["verdict"]["name"] == "not_trained"
    assert (
        report["loss"]["held_out"] == report["loss"]["held_out_base"] == report["loss"]["held_out_last"] > 5
    ), "of random weights: the log of 512 tokens, 6.2"
    assert [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()] == [
        {"step": 0, "held_out": report["loss"]["held_out"]}
    ]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG") and (
        output / "tensorboard" / FILE
    ).is_file()


@pytest.mark.trap("experts-not-trained")
@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_ends_before_the_guard_looks_is_refused(made, tmp_path, steps):
    with pytest.raises(job.StageError, match=f"steps = {steps}; expected 3 or more"):
        short.run(tmp_path, made, steps=steps)


def test_the_learning_rate_rises_and_then_falls_to_zero(made, tmp_path):
    rates = short.rates(short.run(tmp_path, made, steps=10, warmup_steps=3, save_every=10, eval_every=10))
    assert rates[:3] == pytest.approx([5e-3 / 3, 5e-3 * 2 / 3, 5e-3]) and rates[2:] == sorted(
        rates[2:], reverse=True
    )
    assert rate(10, 10, 3, 5e-3) == pytest.approx(0) and rate(0, 10, 0, 5e-3) == 5e-3


def test_training_stops_when_held_out_losses_fall_no_longer_and_keeps_the_best(made, tmp_path, monkeypatch):
    seen = []
    right = Loop.loss

    def rising(self, pack):
        value = right(self, pack)
        if not self.model.training:
            seen.append(short.state(self.model))
            return value * 0 + [0, 3, 1, 2, 4, 5, 6][len(seen) - 1] * self.held_out_tokens
        return value

    monkeypatch.setattr(Loop, "loss", rising)
    output = short.run(tmp_path, made, steps=20, eval_every=1, patience=2)
    report = json.loads((output / "training.json").read_text())
    assert (report["steps"], report["stopped_early"], report["kept_step"]) == (4, True, 2)
    assert all(
        torch.equal(value, seen[2][name]) and not torch.equal(value, seen[4][name])
        for name, value in short.weights(output).items()
    )


def test_rounding_begins_with_the_last_share_of_the_steps(made, tmp_path, monkeypatch):
    """Quantiser in the loop: from then on what the export quantises is rounded, attention never, and the
    best is looked for anew.
    """
    seen, right = [], Loop.step

    def look(self, number):
        seen.append({name for name, module in adapter.adapted(self.model).items() if module.rounded})
        right(self, number)

    monkeypatch.setattr(Loop, "step", look)
    output = short.run(tmp_path / "some", made, qat_share=0.5, eval_every=1)
    experts = {
        f"model.layers.{layer}.mixer.{kind}.{its}_proj"
        for layer in (1, 4)
        for kind in ("experts", "shared_experts")
        for its in ("up", "down")
    }
    # layer 2 stands before attention, and so stays BF16 as attention does
    rounded = experts | {"model.layers.0.mixer.in_proj"}
    assert seen == [set(), set(), rounded, rounded]
    assert json.loads((output / "training.json").read_text())["kept_step"] in (3, 4)
    assert short.losses(output)[3] != short.losses(short.run(tmp_path / "none", made))[3]
    with pytest.raises(job.StageError, match="qat_share with method qlora"):
        short.run(tmp_path / "packed", made, qat_share=0.5, method="qlora")


QAD = {
    "qat_share": 0.8,
    "qat_loss": "teacher",
    "targets": "all",
    "steps": 40,
    "save_every": 15,
    "eval_every": 40,
    "learning_rate": 5e-3,
}


@pytest.fixture(scope="module")
def switch():
    """The adapter as it was when rounding set in; filled by `distilled`."""
    return {}


@pytest.fixture(scope="module")
def distilled(made, switch, tmp_path_factory):
    right = Teacher.record

    def record(self, model, rows, begins):
        switch.update(short.state(model))
        right(self, model, rows, begins)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "record", record)
        return short.watched(tmp_path_factory.mktemp("distilled"), made, **QAD)["task"]


def divergence(task, tensors, rounded):
    """From the teacher, in nats a trained token, of the model with an adapter."""
    model, rows = fit.load_model(task, Ranks()), fit.read_rows(task.inputs["data"] / "train.jsonl")
    adapter.restore(model, tensors)
    for module in assemble.exported(model):
        module.rounded = rounded
    teacher = Teacher(task, Ranks())
    teacher.record(model, rows, begins=False)
    [pack] = packs(rows, 1024)
    with torch.no_grad():
        found, _ = assemble.distillation(model, pack.ids, pack.labels, pack.documents, *teacher.targets(pack))
    return found.item() / trained_tokens(rows)


def test_distillation_learns_what_the_model_said_before_rounding(made, distilled, switch, tmp_path):
    """QAD: at the switch the unrounded model is the teacher itself; steps bring the rounded one nearer to
    it, and as many on the labels (QAT) away.
    """
    losses = short.losses(distilled.output)
    assert 0.5 < losses[9] / losses[8] < 2, "what is told stays the loss of the labels"
    assert divergence(distilled, switch, rounded=False) < 1e-4
    labels = short.weights(short.run(tmp_path, made, **{**QAD, "qat_loss": "labels"}))
    before, qad, qat = (
        divergence(distilled, weights, rounded=True)
        for weights in (switch, short.weights(distilled.output), labels)
    )
    assert qad < 0.9 * before and before < qat


@pytest.mark.trap("teacher-has-moved-on")
def test_a_distilling_run_that_is_resumed_asks_no_teacher_that_has_moved_on(
    made, distilled, tmp_path, monkeypatch
):
    scratch = shutil.copytree(
        distilled.scratch, tmp_path / "scratch", ignore=shutil.ignore_patterns("*-output", "checkpoint-40")
    )
    (tmp_path / "output").mkdir()
    again = replace(distilled, scratch=scratch, output=tmp_path / "output")
    monkeypatch.setattr(assemble, "likeliest_tokens", lambda *_: pytest.fail("the teacher was asked again"))
    fit.run(again)
    assert short.losses(again.output) == pytest.approx(short.losses(distilled.output), abs=1e-5)
    shutil.rmtree(scratch / "checkpoint-40")
    said = scratch / "teacher-0-of-1.safetensors"
    said.write_bytes(said.read_bytes()[:-100])
    with pytest.raises(job.StageError, match="teacher-0-of-1.safetensors is damaged"):
        fit.run(again)
    said.unlink()
    with pytest.raises(job.StageError, match="no teacher in scratch"):
        fit.run(again)


def test_a_teacher_of_nothing_is_refused(made, tmp_path):
    for number, changes in enumerate(({"qat_share": 0.0}, {"targets": "attention"})):
        with pytest.raises(job.StageError, match="nothing to learn from it"):
            short.run(tmp_path / str(number), made, **{**QAD, **changes})


def test_the_adapter_s_config_holds_no_path_and_no_chance(made, trained):
    text = (trained["task"].output / "adapter" / "adapter_config.json").read_text()
    config = json.loads(text)
    assert str(made["base"].parent) not in text and config["base_model_name_or_path"] is None
    assert (
        config["target_modules"] == sorted(targets.PRESETS["all"]["target_modules"])
        and config["r"] == 4
        and config["lora_alpha"] == 8
    )


def test_one_seed_is_one_adapter(made, trained, tmp_path):
    task = trained["task"]
    again, other = (
        replace(task, output=tmp_path / f"{seed}" / "output", scratch=tmp_path / f"{seed}", seed=seed)
        for seed in (0, 1)
    )
    for its in (again, other):
        its.output.mkdir(parents=True)
        fit.run(its)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again.output / "adapter" / name).read_bytes() == (task.output / "adapter" / name).read_bytes()
    assert all(
        not torch.equal(value, short.weights(task.output)[name])
        for name, value in short.weights(other.output).items()
    )


def test_weights_held_decoded_train_the_same_adapter(made, tmp_path):
    outputs = [
        short.run(tmp_path / str(room), made, method="qlora", decoded_gb=room) for room in (0.0, 0.0004, 1.0)
    ]
    wanted, *found = [(output / "adapter" / "adapter_model.safetensors").read_bytes() for output in outputs]
    assert found == [wanted] * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "lora", "decoded_gb": 1.0}, "decoded_gb with method lora"),
        ({"method": "qlora", "decoded_gb": 1e-6}, "no weights fit"),
    ],
)
def test_room_for_decoded_weights_that_holds_none_is_refused(made, tmp_path, changes, words):
    with pytest.raises(job.StageError, match=words):
        fit.run(short.task(tmp_path, made, **changes))


def test_weights_held_decoded_count_as_memory(made):
    config = Checkpoint(made["base"]).config
    params = Parameters(**contracts.defaults("train", method="qlora"))
    plain = memory.bytes_needed(config, params)
    some, more = (memory.bytes_needed(config, replace(params, decoded_gb=room)) for room in (0.0001, 1e3))
    assert "decoded" not in plain and some["decoded"] == 1e5 and 1e5 < more["decoded"] < 1e9


def test_deterministic_reaches_torch_and_the_manifest(made, tmp_path):
    task = short.task(tmp_path, made, deterministic=True)
    try:
        fit.run(task)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert json.loads((task.output / "training.json").read_text())["deterministic"] is True


def test_gradient_checkpointing_trains_the_same_adapter(made, trained, tmp_path):
    output = short.run(tmp_path, made, gradient_checkpointing=True)
    assert all(
        torch.allclose(value, short.weights(trained["task"].output)[name], atol=1e-4)
        for name, value in short.weights(output).items()
    )


def test_a_preset_that_matches_nothing_is_refused(made, tmp_path):
    without_experts = small.tokenizer(small.base(tmp_path / "base", "M*"))
    with pytest.raises(
        job.StageError, match="'experts' wants shared_experts.up_proj, which this model does not have"
    ):
        short.run(tmp_path / "run", {**made, "base": without_experts}, targets="experts")


def test_a_conversation_longer_than_a_sequence_is_refused(made, tmp_path):
    with pytest.raises(
        job.StageError,
        match=(
            r"1 conversations are longer than a packed sequence, the longest 144 tokens; expected at most"
            r" 143.*Set sequence_tokens to 144"
        ),
    ):
        short.run(tmp_path, made, sequence_tokens=143)


def test_a_base_that_is_nvfp4_already_is_refused(made, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(made["base"], other)
    (other / "model.safetensors.index.json").unlink()
    write(
        other / "model.safetensors",
        [Slot("backbone.layers.0.mixer.in_proj.weight_scale_2", "F32", ())],
        lambda slot: torch.ones(()),
    )
    with pytest.raises(job.StageError, match="in NVFP4 already.*train with method nvfp4"):
        short.run(tmp_path / "run", {**made, "base": other})


def test_too_little_memory_is_said_before_loading_with_what_would_fit(made, tmp_path, monkeypatch):
    real = json.loads((Path(__file__).parents[1] / "model" / "golden" / "nano-config.json").read_text())
    params = short.task(
        tmp_path,
        made,
        precision="bfloat16",
        sequence_tokens=16384,
        targets="all",
        rank=16,
        gradient_checkpointing=True,
    ).parameters(Parameters)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 60e9)
    with pytest.raises(
        job.StageError,
        match=(
            r"needs about \d+ GB \(base 63\.2 GB, adapter 7\.\d GB.*60 GB are free.*What fits: method nvfp4"
        ),
    ):
        memory.check(real, params, "cuda")
    memory.check(real, replace(params, method="qlora"), "cuda")
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10e9)
    with pytest.raises(job.StageError, match="Lower sequence_tokens or rank"):
        memory.check(real, replace(params, method="qlora"), "cuda")


def test_a_data_set_without_rows_is_refused(made, tmp_path):
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "eval.jsonl").write_bytes((made["data"] / "eval.jsonl").read_bytes())
    with pytest.raises(job.StageError, match="train.jsonl has no rows"):
        short.run(tmp_path / "run", {**made, "data": tmp_path})


def test_a_loss_that_falls_too_little_warns_or_fails(made, tmp_path, monkeypatch):
    """Recipes that ask for a fall of the training loss still get what they ask for."""
    warnings = short.warnings(monkeypatch)
    short.run(tmp_path / "warned", made, min_loss_drop=0.99)
    assert "the training loss fell by" in warnings[-1] and "wanted at least 99%" in warnings[-1]
    with pytest.raises(job.StageError, match="the training loss fell by .* expected at least 99%"):
        short.run(tmp_path / "failed", made, min_loss_drop=0.99, require_loss_drop=True)


def test_the_held_out_loss_of_the_base_changes_nothing_of_the_adapter(made, trained, tmp_path, monkeypatch):
    right = Loop.evaluate
    monkeypatch.setattr(Loop, "evaluate", lambda self, done: right(self, done) if done else None)
    output = short.run(tmp_path, made)
    assert 0 not in short.losses(output, "held_out")
    path = "adapter/adapter_model.safetensors"
    assert (output / path).read_bytes() == (trained["task"].output / path).read_bytes()


def nothing_held_out(made, folder):
    data = folder / "all"
    data.mkdir(parents=True)
    (data / "train.jsonl").write_bytes((made["data"] / "train.jsonl").read_bytes())
    (data / "eval.jsonl").write_text("")
    return {**made, "data": data}


@pytest.mark.parametrize("changes", [{}, {"patience": 1}, {"steps": 0}])
def test_without_held_out_conversations_the_last_step_is_kept_and_a_warning_says_so(
    made, tmp_path, monkeypatch, changes
):
    warned = short.warnings(monkeypatch)
    output = short.run(tmp_path, nothing_held_out(made, tmp_path), **changes)
    report = json.loads((output / "training.json").read_text())
    assert (
        report["loss"]["held_out"] is None
        and not report["stopped_early"]
        and report["kept_step"] == report["steps"] == changes.get("steps", 4)
    )
    assert short.losses(output, "held_out") == {} and (output / "loss.png").read_bytes().startswith(
        b"\x89PNG"
    )
    assert warned == [
        "no held-out conversation: there is no held-out loss, and the adapter of the last step is kept"
    ]
    assert report["conversations"] == 8


def test_a_run_without_held_out_conversations_learns_what_one_with_them_does(made, tmp_path):
    with_some = short.run(tmp_path / "some", made, steps=4, eval_every=4)  # the best is the last
    with_none = short.run(tmp_path / "none", nothing_held_out(made, tmp_path))
    assert short.losses(with_none) == short.losses(with_some)


@pytest.mark.parametrize(
    ("targets", "width", "narrowest"), [("attention", 64, "[kv]_proj"), ("experts", 64, "experts.0.up_proj")]
)
def test_a_rank_above_the_width_of_a_layer_is_refused_before_the_base_is_loaded(
    made, tmp_path, monkeypatch, targets, width, narrowest
):
    monkeypatch.setattr(fit.assemble, "load", lambda *a, **k: pytest.fail("the base was loaded"))
    with pytest.raises(
        job.StageError,
        match=f"rank {width + 1}, and backbone.*{narrowest}.weight is .*expected a rank of at most {width}",
    ):
        short.run(tmp_path, made, targets=targets, rank=width + 1)
    config = json.loads((made["base"] / "config.json").read_text())
    memory.check_rank(config, Parameters(**contracts.defaults("train", targets=targets, rank=width)))
