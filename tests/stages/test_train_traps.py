"""The traps of training: each silent failure is set on the small checkpoint, and each is noticed."""

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train environment")
peft = pytest.importorskip("peft", reason="needs the train environment")
trl = pytest.importorskip("trl", reason="needs the train environment")
sys.path.insert(0, str(Path(__file__).parent))

import short  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from nemotron import native  # noqa: E402
from nemotron.checkpoint import Checkpoint  # noqa: E402
from stages import job  # noqa: E402
from stages.train import fit  # noqa: E402
from stages.train.watch import Learning  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return short.inputs(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    return short.watched(tmp_path_factory.mktemp("trained"), made)


def changed(model, base):
    """Names of the checkpoint's delicate tensors that are no longer in `model` as they are on disk."""
    here = {name.removeprefix("base_model.model."): value for name, value in model.state_dict().items()}
    stored = Checkpoint(base)
    names = [name for name in stored.entries if name.endswith(("gate.weight", "e_score_correction_bias", "A_log", ".D"))]
    assert len(names) == 2 * 2 + 2 * 2
    return [name for name in names if not torch.equal(here[native.native(name)].float(), stored.tensor(name).float())]


def test_trap_4_training_leaves_every_bit_of_the_router(made, tmp_path, monkeypatch):
    model = short.watched(tmp_path / "frozen", made, precision="bfloat16")["model"]
    assert changed(model, made["base"]) == []

    def thaw(model):
        for name, value in model.named_parameters():
            value.requires_grad_(value.requires_grad or name.endswith("gate.weight"))

    short.change_model(monkeypatch, thaw)
    model = short.watched(tmp_path / "thawed", made, precision="bfloat16")["model"]
    assert changed(model, made["base"]) == ["backbone.layers.1.mixer.gate.weight", "backbone.layers.4.mixer.gate.weight"]


def test_trap_6_eight_times_one_logs_the_loss_of_one_times_eight(made, tmp_path, monkeypatch):
    one = short.task(tmp_path / "one", made, batch=8, accumulation=1)
    eight = short.task(tmp_path / "eight", made, batch=1, accumulation=8)
    fit.run(one)
    fit.run(eight)
    assert short.losses(eight.output) == pytest.approx(short.losses(one.output), rel=1e-5)
    norms = [[row["grad_norm"] for row in short.logged(task) if "grad_norm" in row] for task in (one, eight)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4), "clipping would bite harder"
    assert all(torch.allclose(a, short.weights(eight.output)[name], atol=1e-4) for name, a in short.weights(one.output).items())

    # The trap: a loss that does not know how many tokens the whole step has, which the Trainer takes for one that does.
    right = trl.SFTTrainer.compute_loss
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", lambda self, model, inputs, return_outputs=False, num_items_in_batch=None: right(self, model, inputs))
    wrong = short.run(tmp_path / "wrong", made, batch=1, accumulation=8)
    assert short.losses(wrong)[1] > 7.5 * short.losses(one.output)[1]


def test_trap_7_qlora_says_that_the_experts_stay_unpacked(made, tmp_path, monkeypatch):
    warnings = short.warnings(monkeypatch)
    output = short.run(tmp_path, made, method="qlora")
    groups = json.loads((output / "training.json").read_text())["groups"]
    assert set(groups) == {"embeddings", "attention", "mamba", "experts", "shared", "router", "adapter", "norms"}
    assert groups["attention"]["four_bit"] > 0 and groups["experts"]["four_bit"] == 0
    assert groups["experts"]["bytes"] == 2 * 2 * 4 * 128 * 64 * 4  # layers, projections, experts, shape, float32
    [warning] = warnings
    assert "experts keeps 0.5 MB unpacked" in warning


def test_trap_8_every_adapter_tensor_has_left_its_start(trained):
    after = {name: p for name, p in trained["model"].named_parameters() if p.requires_grad}
    assert after.keys() == trained["start"].keys() and len(after) == 2 * (4 + 2 + 2 * 2 + 2 * 2)  # A and B of attention, in_proj, shared, experts
    assert [name for name, p in after.items() if torch.equal(p, trained["start"][name])] == []
    saved = short.weights(trained["task"].output)
    assert all(torch.equal(saved[name.replace(".default", "")], p) for name, p in after.items())


def cut_off(model):
    """What a fused kernel does that reads a weight past its module: the forward is right, the module's adapter gets nothing."""
    module = next(module for name, module in model.named_modules() if name.endswith("mixer.q_proj"))
    module.register_forward_hook(lambda module, inputs, output: output.detach())


def test_trap_8_an_adapter_without_gradient_is_refused_by_name(made, tmp_path, monkeypatch):
    short.change_model(monkeypatch, cut_off)
    with pytest.raises(job.StageError, match=r"2 of 28 adapter tensors have no gradient.*layers\.3\.mixer\.q_proj\.lora_A"):
        short.run(tmp_path / "checked", made)
    monkeypatch.setattr(Learning, "on_step_end", TrainerCallback.on_step_end)
    unnoticed = short.weights(short.run(tmp_path / "unchecked", made))  # no library minds
    assert [name for name, value in unnoticed.items() if "lora_B" in name and not value.any()] == ["base_model.model.model.layers.3.mixer.q_proj.lora_B.weight"]


def test_trap_8_an_adapter_that_does_not_move_is_refused_by_name(made, tmp_path, monkeypatch):
    class Forgetful(TrainerCallback):
        """An optimizer that has lost one tensor, as after a cast that makes a new one."""

        def __init__(self, parameter):
            self.parameter, self.start = parameter, parameter.detach().clone()

        def on_optimizer_step(self, *_, **__):
            self.parameter.data.copy_(self.start)

    def forgetful(task, model, *rows):
        its = right(task, model, *rows)
        its.add_callback(Forgetful(next(p for name, p in model.named_parameters() if "in_proj.lora_B" in name)))
        return its

    def begin_with_b(model):
        for name, p in model.named_parameters():
            if "in_proj.lora_B" in name:
                p.data.fill_(0.01)  # B starts at zero, and as long as it stays there A has no gradient either

    right = fit.make_trainer
    monkeypatch.setattr(fit, "make_trainer", forgetful)
    short.change_model(monkeypatch, begin_with_b)
    with pytest.raises(job.StageError, match=r"have not changed after 3 steps.*in_proj\.lora_B"):
        short.run(tmp_path, made)


@pytest.mark.parametrize("preset", native.PRESETS)
def test_trap_10_no_preset_puts_an_adapter_on_out_proj(made, tmp_path, preset):
    model = fit.adapted(short.task(tmp_path, made, targets=preset))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and not any("out_proj" in name for name in trainable)
    assert any(name.endswith("mixer.out_proj.weight") for name, _ in model.named_parameters()), "there has to be an out_proj to leave out"


def test_trap_10_peft_still_refuses_out_proj(made):
    with pytest.raises(ValueError, match="out_proj"):
        peft.get_peft_model(native.load(made["base"]), peft.LoraConfig(target_modules=["out_proj"], task_type="CAUSAL_LM"))


def test_trap_11_evaluating_between_steps_changes_nothing_in_four_bits(made, tmp_path, monkeypatch):
    from bitsandbytes.functional import has_avx512bf16

    params = {"method": "qlora", "targets": "attention"}
    never, always = short.run(tmp_path / "never", made, **params, eval_every=99), short.run(tmp_path / "always", made, **params, eval_every=1)
    assert short.losses(always) == short.losses(never)
    assert all(torch.equal(value, short.weights(never)[name]) for name, value in short.weights(always).items())
    if not has_avx512bf16():
        return  # the trap is in a path of these machines only

    def repack(model):
        for name, module in model.named_modules():
            if name.endswith(("_proj.base_layer")):
                module.support_avx512bf16_for_cpu = True

    short.change_model(monkeypatch, repack)
    trapped = short.losses(short.run(tmp_path / "trapped", made, **params, eval_every=1))
    assert trapped[4] < trapped[1] and trapped[4] != short.losses(never)[4], "the loss still falls, but along another way"


def test_trap_12_rows_are_never_packed_and_padding_changes_no_logit(made, tmp_path):
    its, rows = short.trainer(tmp_path, made, batch=3)
    model = its.model.eval()
    for batch in its.get_train_dataloader():
        assert set(batch) == {"input_ids", "labels", "attention_mask"}  # position_ids or seq_idx would tell of packing
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert ids[: mask.sum()].tolist() in [row["input_ids"] for row in rows], "a row begins at position 0 and ends before its padding"
    with torch.no_grad():
        brief, long = (torch.tensor([rows[i]["input_ids"]]) for i in (0, 7))
        alone = model(input_ids=brief).logits[0]
        batch = its.data_collator([rows[0], rows[7]])
        padded = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, : len(alone)]
        joined = model(input_ids=torch.cat([long, brief], 1)).logits[0, -len(alone) :]
    assert torch.allclose(padded, alone, atol=1e-5)
    assert not torch.allclose(joined, alone, atol=1e-2), "a row behind another has to be seen to differ, or this test shows nothing"


def test_trap_16_padding_is_0_and_every_answers_end_is_trained(made, tmp_path, monkeypatch):
    its, rows = short.trainer(tmp_path / "right", made)
    batch = its.data_collator(rows)
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["input_ids"][padding] == 0).all() and (batch["labels"][padding] == -100).all()
    assert (batch["labels"] == 11).sum(1).tolist() == [2] * 8  # <|im_end|> of two answers a row
    assert its.processing_class.pad_token_id == 0 and its.model.config.pad_token_id == 0

    monkeypatch.setattr(fit, "PAD", None)
    assert short.trainer(tmp_path / "wrong", made)[0].processing_class.pad_token_id == 11, "left alone, TRL pads with <|im_end|>"


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_trap_17_adapters_are_float32_on_a_bf16_base(made, tmp_path, monkeypatch, method):
    seen = set()
    right = Learning.on_pre_optimizer_step

    def look(self, *arguments, **keywords):
        seen.update((p.dtype, p.grad.dtype) for p in self.tensors.values())
        right(self, *arguments, **keywords)

    monkeypatch.setattr(Learning, "on_pre_optimizer_step", look)
    output = short.run(tmp_path, made, method=method, precision="bfloat16")
    assert seen == {(torch.float32, torch.float32)}
    assert {value.dtype for value in short.weights(output).values()} == {torch.float32}


def test_trap_17_trl_rounds_the_adapter_of_a_four_bit_base_and_the_stage_undoes_it(made, tmp_path, monkeypatch):
    right, rounded = trl.SFTTrainer.__init__, set()

    def look(self, *arguments, **keywords):
        right(self, *arguments, **keywords)
        rounded.update(p.dtype for p in self.model.parameters() if p.requires_grad)

    monkeypatch.setattr(trl.SFTTrainer, "__init__", look)
    its, _ = short.trainer(tmp_path, made, method="qlora")
    assert rounded == {torch.bfloat16} and {p.dtype for p in its.model.parameters() if p.requires_grad} == {torch.float32}
