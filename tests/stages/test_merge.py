"""Merge: the adapter where it belongs, everything else untouched."""

import json
import shutil

import pytest
import small
from safetensors.torch import load_file, save_file

from model.lora import Adapter, Change
from model.weights.checkpoint import Checkpoint
from stages.job import StageError
from stages.merge import merge

PARAMS = {"proof_tokens": 300, "proof_precision": "float32", "control": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    small.base(folder / "base")
    return {
        "base": folder / "base",
        "train": small.adapter(folder / "train", folder / "base"),
        "data": small.data(folder / "data"),
    }


@pytest.fixture(scope="module")
def merged(made, tmp_path_factory):
    its = small.job("merge", tmp_path_factory.mktemp("merged"), PARAMS, **made)
    merge.run(its)  # holds the forward proof on 300 tokens
    return its.output


def test_the_proof_holds_in_bfloat16_which_the_real_model_needs_for_its_memory(made, tmp_path):
    its = small.job("merge", tmp_path, {**PARAMS, "proof_precision": "bfloat16"}, **made)
    merge.run(its)
    facts = json.loads((its.output / "merge.json").read_text())
    assert 0 < facts["rounding_error"] == facts["merge_error"] < facts["adapter_effect"]


@pytest.mark.trap("renamed-and-recast-tensors")
def test_names_and_dtypes_survive_the_merge(made, merged):
    before, after = Checkpoint(made["base"]), Checkpoint(merged)
    assert {n: (e.dtype, e.shape, e.file.name) for n, e in before.entries.items()} == {
        n: (e.dtype, e.shape, e.file.name) for n, e in after.entries.items()
    }
    for name in ("config.json", "tokenizer_config.json"):
        if (made["base"] / name).exists():
            assert (made["base"] / name).read_bytes() == (merged / name).read_bytes()


@pytest.mark.trap("save-stops-after-the-config")
def test_nothing_goes_through_save_pretrained(made, merged):
    assert sum(f.stat().st_size for f in merged.glob("*.safetensors")) == sum(
        f.stat().st_size for f in made["base"].glob("*.safetensors")
    )


@pytest.mark.trap("router-in-bf16")
def test_the_correction_bias_keeps_its_bits(made, merged):
    before, after = Checkpoint(made["base"]), Checkpoint(merged)
    biases = [n for n in before.entries if n.endswith("e_score_correction_bias")]
    assert biases and all(before.raw(n) == after.raw(n) for n in biases)


@pytest.mark.trap("expert-adapter-misread")
def test_every_expert_gets_its_own_change(made, merged):
    before, after = Checkpoint(made["base"]), Checkpoint(merged)
    experts = [n for n in before.entries if ".experts." in n]
    assert len(experts) == 2 * 2 * 4 and all(before.raw(n) != after.raw(n) for n in experts)


@pytest.mark.trap("expert-adapter-misread")
def test_a_misread_packing_is_refused(made, tmp_path, monkeypatch):
    right, other = Adapter.change, {".experts.0.": ".experts.1.", ".experts.1.": ".experts.0."}

    def exchanged(self, name):
        return right(self, next((name.replace(one, two) for one, two in other.items() if one in name), name))

    monkeypatch.setattr(Adapter, "change", exchanged)
    with pytest.raises(
        StageError,
        match=r"layers\.1\.mixer\.experts\.0\.up_proj\.weight is not the base with the adapter's change",
    ):
        merge.run(small.job("merge", tmp_path, PARAMS, **made))


@pytest.mark.trap("experts-not-trained")
def test_an_adapter_that_changes_nothing_is_refused(made, tmp_path):
    idle = small.adapter(tmp_path / "idle", made["base"], size=0.0)
    with pytest.raises(StageError, match="changes nothing in"):
        merge.run(small.job("merge", tmp_path, PARAMS, **{**made, "train": idle}))


def test_a_control_is_merged_where_the_recipe_says_that_it_is_one(made, tmp_path):
    its = small.job(
        "merge",
        tmp_path,
        {**PARAMS, "control": True},
        **{**made, "train": small.adapter(tmp_path / "zero", made["base"], size=0.0)},
    )
    merge.run(its)
    facts = json.loads((its.output / "merge.json").read_text())
    assert facts["control"] and facts["merged"] and not facts["changed_elements"]
    assert all(
        (its.output / path.name).read_bytes() == path.read_bytes() for path in made["base"].iterdir()
    ), "the base bit for bit"


@pytest.mark.parametrize("size", [0.05, 1e-30])  # one that shows, and one that BF16 rounds away
def test_a_control_that_was_trained_is_refused(made, tmp_path, size):
    trained = small.adapter(tmp_path / "trained", made["base"], size=size)
    with pytest.raises(
        StageError, match="lora_B.* of a control are not zero; expected an adapter whose B is zero"
    ):
        merge.run(small.job("merge", tmp_path, {**PARAMS, "control": True}, **{**made, "train": trained}))


def test_a_control_that_changes_a_byte_is_refused(made, tmp_path, monkeypatch):
    monkeypatch.setattr(Change, "merged", lambda self, weight: weight + 1)
    zero = small.adapter(tmp_path / "zero", made["base"], size=0.0)
    with pytest.raises(StageError, match="differs from the source though the adapter is zero"):
        merge.run(small.job("merge", tmp_path, {**PARAMS, "control": True}, **{**made, "train": zero}))


def test_a_zero_adapter_gives_back_every_byte(made, tmp_path):
    folder, query = shutil.copytree(made["base"], tmp_path / "base"), "backbone.layers.3.mixer.q_proj.weight"
    file = Checkpoint(folder).entries[query].file
    weights = load_file(file)
    weights[query][0] = -0.0
    save_file(weights, file, metadata={"format": "pt"})
    base = Checkpoint(folder)
    (tmp_path / "merged").mkdir()
    changed = merge.stream(
        base,
        Adapter(small.adapter(tmp_path / "zero", made["base"], size=0.0) / "adapter", base),
        tmp_path / "merged",
    )
    assert changed and not any(changed.values())
    assert all(
        (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes() for path in base.folder.iterdir()
    )


@pytest.mark.trap("expert-adapter-misread")
def test_an_adapter_with_a_module_for_every_expert_is_the_same_merge(made, merged, tmp_path):
    """As PEFT writes it on the hub's own class."""
    native = load_file(made["train"] / "adapter" / "adapter_model.safetensors")
    split = {}
    for name, value in native.items():
        stem, _, last = name.replace("base_model.model.model.", "base_model.model.backbone.").rpartition(
            ".mixer."
        )
        if not last.startswith("experts."):
            split[f"{stem}.mixer.{last}"] = value
            continue
        projection, side = "up_proj" if "base_layer" in last else "down_proj", last.split("lora_")[1][0]
        for expert in range(4):
            part = value.view(4, 4, -1)[expert] if side == "A" else value.view(len(value), 4, 4)[:, :, expert]
            split[f"{stem}.mixer.experts.{expert}.{projection}.lora_{side}.weight"] = part.contiguous()
    shutil.copytree(made["train"], tmp_path / "train")
    save_file(split, tmp_path / "train" / "adapter" / "adapter_model.safetensors")
    file = tmp_path / "train" / "adapter" / "adapter_config.json"
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj"]
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "target_modules": modules, "target_parameters": None})
    )
    its = small.job("merge", tmp_path, PARAMS, **{**made, "train": tmp_path / "train"})
    merge.run(its)
    before, after = Checkpoint(merged), Checkpoint(its.output)
    assert all(before.raw(name) == after.raw(name) for name in before.entries)


def test_an_adapter_of_another_model_is_refused_by_name(made, tmp_path):
    file = made["train"] / "adapter" / "adapter_model.safetensors"
    other = tmp_path / "other" / "adapter"
    other.mkdir(parents=True)
    (other / "adapter_config.json").write_bytes((file.parent / "adapter_config.json").read_bytes())
    save_file(
        {n.replace("layers.3.", "layers.9."): t for n, t in load_file(file).items()},
        other / "adapter_model.safetensors",
    )
    with pytest.raises(StageError, match="layers.9"):
        merge.run(small.job("merge", tmp_path, PARAMS, **{**made, "train": other.parent}))
