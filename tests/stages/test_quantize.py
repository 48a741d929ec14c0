"""Quantise, and the audit of what was written: each broken checkpoint is caught by name."""

import json
import shutil

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

from model import audit, checkpoint_audit, layouts, packed_audit
from model.families.nemotron_h import names, native
from model.families.nemotron_h.layout import LAYOUTS
from model.weights import quant_config
from model.weights.checkpoint import INDEX, Checkpoint
from stages.job import StageError
from stages.quantize import calibrate, fidelity, quantize, reference

PARAMS = {
    "layout": "nvidia",
    "format": "w4a4",
    "scales": "nearest",
    "engine": "own",
    "kv_cache": "FP8",
    "calibration_rows": 2,
    "calibration_tokens": 64,
    "fidelity_tokens": 200,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small.base(tmp_path_factory.mktemp("source") / "base")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    its = small.job("quantize", folder, PARAMS, merge=source, data=small.data(folder / "data"))
    quantize.run(its)
    return its.output


def test_the_audit_passes_and_the_config_is_the_source_s(source, made):
    assert audit.nvfp4(made, "nvidia", source) == []
    assert json.loads((made / "audit.json").read_text())["findings"] == []
    whole = checkpoint_audit.audit(made, source, deep=True)
    assert whole.findings == [] and whole.facts["compared"]["rule"] == "nearest"
    assert packed_audit.record(made).input_scales
    assert (made / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.trap("router-in-bf16")
def test_the_correction_bias_keeps_its_bits(source, made):
    before, after = Checkpoint(source), Checkpoint(made)
    assert all(
        before.raw(n) == after.raw(n)
        for n in before.entries
        if n.endswith(("e_score_correction_bias", "A_log", ".D"))
    )


@pytest.mark.trap("corrupted-names")
def test_no_control_character_in_any_name(made):
    listed = json.loads((made / audit.QUANT).read_text())["quantization"]["exclude_modules"]
    assert all(n.isprintable() for n in [*listed, *Checkpoint(made).entries])
    assert "lm_head" in listed


@pytest.mark.parametrize("chosen", LAYOUTS)
def test_our_calibration_finds_modelopt_s_maxima(source, made, chosen):
    """The two read the same conversations, packed here and one by one there; experts keep their own
    maximum here and share one there.
    """
    checkpoint = Checkpoint(source)
    rows = calibrate.conversations(made.parent / "data" / "train.jsonl", 4, 150)
    ours, idle = calibrate.maxima(checkpoint, chosen, rows, "cpu")
    theirs = reference.maxima(source, checkpoint.config, chosen, rows, "cpu")
    assert ours.keys() == theirs.keys() == set(layouts.quantised(checkpoint.config, chosen)) and not idle
    for name, wanted in theirs.items():
        stack = (
            [
                ours[n]
                for n in ours
                if n.split(".experts.")[0] == name.split(".experts.")[0] and n.endswith(name[-7:])
            ]
            if ".experts." in name
            else [ours[name]]
        )
        assert torch.stack(stack).max().item() == pytest.approx(wanted.item(), rel=1e-5), name
        assert ours[name] <= wanted * 1.00001


@pytest.mark.trap("missing-scales")
def test_an_idle_expert_takes_its_layer_s_maximum_and_is_named(source):
    """One token reaches two of four experts."""
    checkpoint = Checkpoint(source)
    found, idle = calibrate.maxima(checkpoint, "experts", [torch.tensor([30])], "cpu")
    layers = {name.split(".experts.")[0] for name in found}
    assert len(idle) == len(layers) * 2 * 2 and set(idle) < set(found)
    for name in idle:
        stem, _, projection = name.split(".experts.")[0], None, name.rsplit(".", 1)[1]
        assert (
            found[name]
            == max(found[n] for n in found if n.startswith(stem + ".experts.") and n.endswith(projection))
            > 0
        )


def test_weights_alone_need_no_forward_and_have_no_input_scale(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        calibrate, "maxima", lambda *_: pytest.fail("a forward for a format that has no input scale")
    )
    its = small.job(
        "quantize", tmp_path, {**PARAMS, "format": "w4a16"}, merge=source, data=small.data(tmp_path / "data")
    )
    quantize.run(its)
    made = Checkpoint(its.output)
    assert (
        not [name for name in made.entries if name.endswith("input_scale")]
        and audit.nvfp4(its.output, "nvidia", source, weight_only=True) == []
    )
    config = json.loads((its.output / "config.json").read_text())
    settings = json.loads((its.output / audit.QUANT).read_text())
    assert settings["quantization"]["quant_algo"] == "W4A16_NVFP4"
    assert config.pop("quantization_config") == {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_NVFP4",
        "group_size": 16,
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": settings["producer"],
        "ignore": settings["quantization"]["exclude_modules"],
    }
    assert config == json.loads((source / "config.json").read_text())  # all else is the source's


def test_weights_alone_are_not_handed_on_where_no_vllm_reads_that_they_are(source, tmp_path, monkeypatch):
    monkeypatch.setattr(quant_config, "ONLY_IN_CONFIG", ())
    its = small.job(
        "quantize", tmp_path, {**PARAMS, "format": "w4a16"}, merge=source, data=small.data(tmp_path / "data")
    )
    with pytest.raises(StageError, match="no quantization_config in config.json"):
        quantize.run(its)


def test_a_kv_cache_that_config_json_has_no_form_for_is_refused(source):
    with pytest.raises(ValueError, match="NVFP4.*expected FP8 or null"):
        quant_config.for_config_json(
            layouts.hf_quant_config(Checkpoint(source).config, "nvidia", "NVFP4", "0", weight_only=True)
        )


@pytest.mark.trap("missing-scales")
def test_every_expert_has_every_scale(source, made):
    after = Checkpoint(made)
    for name in layouts.quantised(after.config, "nvidia"):
        for part in layouts.PARTS:
            assert (after.tensor(f"{name}.{part}").float() > 0).all()


@pytest.mark.trap("unified-attention-scales")
def test_attention_is_not_quantised(made):
    assert all(
        e.dtype == "BF16"
        for n, e in Checkpoint(made).entries.items()
        if n.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj")
    )


BREAKS = {
    "missing scale": (lambda t, n: t.pop(f"{n}.input_scale"), "input_scale"),
    "NaN scale": (
        lambda t, n: t.update({f"{n}.weight_scale_2": torch.tensor(float("nan"))}),
        "weight_scale_2",
    ),
    "zero scale": (lambda t, n: t.update({f"{n}.input_scale": torch.tensor(0.0)}), "input_scale"),
    "scale of shape (1,)": (lambda t, n: t.update({f"{n}.input_scale": torch.ones(1)}), "input_scale"),
    "transposed expert": (lambda t, n: t.update({f"{n}.weight": t[f"{n}.weight"].T.contiguous()}), ".weight"),
    "extra tensor": (lambda t, n: t.update({"lora_left_over": torch.ones(1)}), "lora_left_over"),
}


def broken(made, folder, module, change):
    shutil.copytree(made, folder)
    file = Checkpoint(folder).entries[f"{module}.weight"].file
    tensors = load_file(file)
    change(tensors, module)
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    others = {name: shard for name, shard in index["weight_map"].items() if shard != file.name}
    (folder / INDEX).write_text(json.dumps({"weight_map": others | dict.fromkeys(tensors, file.name)}))
    return folder


@pytest.mark.parametrize("fault", BREAKS)
def test_a_broken_checkpoint_is_caught_by_name(source, made, tmp_path, fault):
    change, subject = BREAKS[fault]
    module = next(
        n for n in layouts.quantised(Checkpoint(made).config, "nvidia") if n.endswith(".experts.0.down_proj")
    )
    folder = broken(made, tmp_path / "broken", module, change)
    assert any(subject in f.subject for f in audit.nvfp4(folder, "nvidia", source))


def test_fidelity_is_what_the_dequantised_weights_give_in_the_native_class(source, made, tmp_path):
    """Loss, KL and agreement again, from two whole models; the second has the weights that the exported
    codes stand for.
    """
    held_out = fidelity.held_out_rows(made.parent / "data" / "eval.jsonl", 200)
    found = json.loads((made / "audit.json").read_text())["fidelity"]
    stood_for = fidelity.dequantising_reader(Checkpoint(made))
    before = native.load(source)
    after = native.load(source)
    parameters = dict(after.named_parameters())
    for name in Checkpoint(source).entries:
        if ".experts." in name:
            parameters[names.native(name).removesuffix(".weight")].data[
                int(name.split(".experts.")[1].split(".")[0])
            ] = stood_for(name)
        elif f"{name}_scale" in Checkpoint(made).entries:
            parameters[names.native(name)].data = stood_for(name)
    p, q, targets = [], [], []
    with torch.no_grad():
        for ids, following in held_out:
            trained = following != -100
            p.append(before(input_ids=ids[None], use_cache=False).logits[0][trained].log_softmax(-1))
            q.append(after(input_ids=ids[None], use_cache=False).logits[0][trained].log_softmax(-1))
            targets.append(following[trained])
    p, q, targets = torch.cat(p), torch.cat(q), torch.cat(targets)
    assert found["tokens"] == len(targets) > 50
    assert (
        found["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
        and found["kl"] > 1e-5
    )
    for name, logs in (("source", p), ("quantised", q)):
        assert found["loss"][name] == pytest.approx(-logs.gather(1, targets[:, None]).mean().item(), rel=1e-5)
    assert found["greedy_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    assert len(found["layers"]) == 5 and 0 < found["layers"][0] < 0.2


def test_searched_scales_bring_the_model_nearer_to_its_source(source, made, tmp_path):
    its = small.job(
        "quantize", tmp_path, {**PARAMS, "scales": "mse"}, merge=source, data=small.data(tmp_path / "data")
    )
    quantize.run(its)
    nearest, mse = (
        json.loads((folder / "audit.json").read_text())["fidelity"] for folder in (made, its.output)
    )
    assert mse["kl"] < nearest["kl"] and mse["layers"][-1] < nearest["layers"][-1]
    whole = checkpoint_audit.audit(its.output, source, deep=True)
    assert whole.findings == [] and whole.facts["compared"]["rule"] == "mse"


def test_a_renamed_embedding_is_caught(source, tmp_path):
    def rename(tensors, module):
        tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")

    found = audit.bf16(broken(source, tmp_path / "broken", "backbone.embeddings", rename))
    assert {f.subject for f in found} == {"backbone.embeddings.weight", "backbone.embedding.weight"}


def test_a_corrupted_exclude_is_caught(source, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "broken")
    quant = json.loads((folder / audit.QUANT).read_text())
    quant["quantization"]["exclude_modules"][0] = "lm_head.\0backbone.pt_name_sentinel"
    (folder / audit.QUANT).write_text(json.dumps(quant))
    found = audit.nvfp4(folder, "nvidia", source)
    assert any("control character" in f.expected for f in found) and any("lm_head" in f.found for f in found)


def test_a_truncated_file_is_caught(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "broken")
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    assert file.name in audit.bf16(folder)[0].found


def test_a_quantised_base_is_refused_with_its_reason(made):
    assert "NVFP4" in audit.bf16(made)[0].found


@pytest.mark.trap("quantiser-refuses-cpu-late")
def test_the_calibrated_scales_come_from_a_forward_that_ran_on_cpu(made):
    after = Checkpoint(made)
    scales = {after.tensor(n).item() for n in after.entries if n.endswith("input_scale")}
    assert len(scales) > 2  # one a projection and layer, not one default for all


def test_without_held_out_conversations_the_comparison_is_left_out_with_a_warning(
    source, tmp_path, monkeypatch
):
    warned = []
    monkeypatch.setattr(quantize.job, "warning", lambda message, remedy="": warned.append(message))
    data = small.data(tmp_path / "data")
    (data / "eval.jsonl").write_text("")
    its = small.job("quantize", tmp_path, PARAMS, merge=source, data=data)
    quantize.run(its)
    report = json.loads((its.output / "audit.json").read_text())
    assert "fidelity" not in report and report["findings"] == []
    assert [message for message in warned if "held-out" in message] == [
        "no held-out conversation: the quantised model's loss, KL and error by layer were not measured"
    ]
