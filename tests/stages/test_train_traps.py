"""The traps of training: each silent failure is set on the small checkpoint, and each is noticed."""

import json

import peft
import pytest
import short
import torch

from model.families.nemotron_h import names, native, targets
from model.layers.documents import Documents
from model.layers.projection import Projection
from model.weights.checkpoint import Checkpoint
from stages import job
from stages.train import fit
from stages.train.guard import Guard
from stages.train.loop import Loop
from stages.train.pack import Pack, packs, trained_tokens
from stages.train.ranks import Ranks


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return short.inputs(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    return short.watched(tmp_path_factory.mktemp("trained"), made)


@pytest.mark.trap("router-in-bf16")
def test_training_leaves_every_bit_of_the_router(made, tmp_path, monkeypatch):
    def changed(model):
        here, stored = model.state_dict(), Checkpoint(made["base"])
        exact = [
            name
            for name in stored.entries
            if name.endswith(("gate.weight", "e_score_correction_bias", "A_log", ".D"))
        ]
        assert len(exact) == 2 * 2 + 2 * 2
        return [
            name
            for name in exact
            if not torch.equal(here[names.native(name)].float(), stored.tensor(name).float())
        ]

    assert changed(short.watched(tmp_path / "frozen", made, precision="bfloat16")["model"]) == []
    short.change_model(
        monkeypatch,
        lambda model: [
            p.requires_grad_() for name, p in model.named_parameters() if name.endswith("gate.weight")
        ],
    )
    model = short.watched(tmp_path / "thawed", made, precision="bfloat16")["model"]
    assert changed(model) == ["backbone.layers.1.mixer.gate.weight", "backbone.layers.4.mixer.gate.weight"]


@pytest.mark.trap("loss-not-divided-by-accumulation")
def test_many_sequences_log_the_loss_of_one(made, tmp_path, monkeypatch):
    one = short.task(tmp_path / "one", made, sequence_tokens=4096)
    many = short.task(tmp_path / "many", made, sequence_tokens=144)
    rows = fit.read_rows(made["data"] / "train.jsonl")
    assert len(packs(rows, 4096)) == 1 and len(packs(rows, 144)) >= 4
    fit.run(one)
    fit.run(many)
    assert short.losses(many.output) == pytest.approx(short.losses(one.output), rel=1e-5)
    assert short.history(many).norm == pytest.approx(short.history(one).norm, rel=1e-3), (
        "clipping would bite harder"
    )
    assert all(
        torch.allclose(a, short.weights(many.output)[name], atol=1e-4)
        for name, a in short.weights(one.output).items()
    )

    # The trap: each sequence takes the mean of its own, and they are summed.
    right, whole = Loop.loss, trained_tokens(rows)

    def own_mean(self, pack):
        own = int((pack.labels[1:] != -100).sum())
        return right(self, pack) * (whole / own if self.model.training else 1)

    monkeypatch.setattr(Loop, "loss", own_mean)
    wrong = short.run(tmp_path / "wrong", made, sequence_tokens=144)
    assert short.losses(wrong)[1] > 3 * short.losses(one.output)[1]


@pytest.mark.trap("experts-not-quantised")
@pytest.mark.parametrize("method", ["qlora", "nvfp4"])
def test_the_experts_are_in_four_bits(made, tmp_path, method):
    groups = json.loads((short.run(tmp_path, made, method=method) / "training.json").read_text())["groups"]
    assert set(groups) == {
        "embeddings",
        "attention",
        "mamba",
        "experts",
        "shared",
        "router",
        "adapter",
        "norms",
    }
    assert (
        groups["experts"]["four_bit"] / groups["experts"]["bytes"] > 0.88
        and groups["attention"]["four_bit"] == 0
    )


@pytest.mark.trap("experts-not-trained")
def test_every_adapter_tensor_has_left_its_start(trained):
    after = {name: p for name, p in trained["model"].named_parameters() if p.requires_grad}
    # A and B of attention, in_proj, shared, experts
    assert after.keys() == trained["start"].keys() and len(after) == 2 * (4 + 2 + 2 * 2 + 2 * 2)
    assert [name for name, p in after.items() if torch.equal(p, trained["start"][name])] == []
    saved = short.weights(trained["task"].output)
    assert len(saved) == len(after) and all(value.abs().sum() > 0 for value in saved.values())


@pytest.mark.trap("experts-not-trained")
def test_an_adapter_without_gradient_is_refused_by_name(made, tmp_path, monkeypatch):
    def cut_off(model):
        """What a kernel does that reads a weight past its module: the forward is right, the module's
        adapter gets nothing.
        """
        next(
            module for name, module in model.named_modules() if name.endswith("mixer.q_proj")
        ).register_forward_hook(lambda module, inputs, output: output.detach())

    short.change_model(monkeypatch, cut_off)
    with pytest.raises(
        job.StageError, match=r"2 of 28 adapter tensors have no gradient.*layers\.3\.mixer\.q_proj\.lora_a"
    ):
        short.run(tmp_path / "checked", made)
    monkeypatch.setattr(Guard, "check_movement", lambda self: None)
    unnoticed = short.weights(short.run(tmp_path / "unchecked", made))  # nothing else minds
    assert [name for name, value in unnoticed.items() if "lora_B" in name and not value.any()] == [
        "base_model.model.model.layers.3.mixer.q_proj.lora_B.weight"
    ]


@pytest.mark.trap("experts-not-trained")
def test_an_adapter_that_does_not_move_is_refused_by_name(made, tmp_path, monkeypatch):
    def begin_with_b(model):
        for module in model.modules():
            if isinstance(module, Projection) and module.rank:
                module.lora_b.data.fill_(0.01)  # as long as B is zero A has no gradient either

    def forgetful(self):
        """An optimiser that has lost one tensor, as after a cast that makes a new one."""
        its = next(p for name, p in self.tensors.items() if "in_proj.lora_b" in name)
        (
            its.data.copy_(next(value for name, value in self.start.items() if "in_proj.lora_b" in name))
            if self.start
            else None
        )
        right(self)

    right = Guard.check_movement
    monkeypatch.setattr(Guard, "check_movement", forgetful)
    short.change_model(monkeypatch, begin_with_b)
    with pytest.raises(job.StageError, match=r"have not changed after 3 steps.*in_proj\.lora_b"):
        short.run(tmp_path, made)


@pytest.mark.parametrize("preset", targets.PRESETS)
@pytest.mark.trap("out-proj-bypassed")
def test_no_preset_puts_an_adapter_on_out_proj(made, tmp_path, preset):
    """peft, which vLLM and stage merge's proof read adapters with, refuses it."""
    model = fit.load_model(short.task(tmp_path, made, targets=preset), Ranks())
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and not any("out_proj" in name for name in trainable)
    assert any(name.endswith("mixer.out_proj") for name, _ in model.named_modules()), (
        "there has to be an out_proj to leave out"
    )


@pytest.mark.trap("out-proj-bypassed")
def test_peft_still_refuses_out_proj(made):
    with pytest.raises(ValueError, match="out_proj"):
        peft.get_peft_model(
            native.load(made["base"]), peft.LoraConfig(target_modules=["out_proj"], task_type="CAUSAL_LM")
        )


@pytest.mark.trap("repacked-in-evaluation")
@pytest.mark.parametrize("method", ["lora", "qlora", "nvfp4"])
def test_evaluating_between_steps_changes_nothing(made, tmp_path, method):
    never, always = (
        short.run(tmp_path / name, made, method=method, eval_every=every)
        for name, every in (("never", 4), ("always", 1))
    )
    assert short.losses(always) == short.losses(never)


@pytest.mark.trap("packing-leaks")
def test_a_packed_step_is_its_conversations_one_by_one(made, tmp_path):
    its, rows = short.loop(tmp_path, made)
    [pack] = packs(rows, 1024)
    assert sorted(pack.documents.lengths) == sorted(len(row["input_ids"]) for row in rows), (
        "no token of a step is padding"
    )
    with torch.no_grad():
        alone = sum(
            its.loss(
                Pack(
                    torch.tensor(row["input_ids"]),
                    torch.tensor(row["labels"]),
                    Documents((len(row["input_ids"]),)),
                )
            )
            for row in rows
        )
        assert its.loss(pack) == pytest.approx(alone.item(), rel=1e-5)
        leaking = its.loss(Pack(pack.ids, pack.labels, Documents((len(pack.ids),))))
        assert abs(leaking / alone - 1) > 1e-4, (
            "without boundaries the loss has to be another, or this test shows nothing"
        )


@pytest.mark.trap("few-trained-tokens")
def test_a_row_of_which_nothing_is_trained_adds_nothing(made, tmp_path):
    its, rows = short.loop(tmp_path, made)
    untrained = {**rows[0], "labels": [-100] * len(rows[0]["labels"])}
    with torch.no_grad():
        assert its.loss(packs([untrained], 1024)[0]).item() == 0
    assert trained_tokens(rows) == 2 * sum(length + 1 for length in short.LENGTHS)


@pytest.mark.trap("pad-is-the-end-token")
def test_no_padding_and_every_answers_end_is_trained(made):
    rows = fit.read_rows(made["data"] / "train.jsonl")
    [pack] = packs(rows, 1024)
    assert len(pack.ids) == sum(len(row["input_ids"]) for row in rows) and 0 not in pack.ids
    assert (pack.labels == 11).sum() == 2 * len(rows)  # <|im_end|> of two answers a row


@pytest.mark.trap("resumed-run-differs")
@pytest.mark.parametrize("method", ["lora", "qlora", "nvfp4"])
def test_adapters_are_float32_on_a_bf16_base(made, tmp_path, monkeypatch, method):
    seen, right = set(), Guard.check_gradients

    def look(self, step):
        seen.update((p.dtype, p.grad.dtype) for p in self.tensors.values())
        return right(self, step)

    monkeypatch.setattr(Guard, "check_gradients", look)
    task = short.task(tmp_path, made, method=method, precision="bfloat16")
    fit.run(task)
    assert seen == {(torch.float32, torch.float32)}
    assert {value.dtype for value in short.weights(task.output).values()} == {torch.float32}
    moments = torch.load(task.scratch / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"].values()
    assert {row[name].dtype for row in moments for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
