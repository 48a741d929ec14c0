"""Stage merge takes every adapter that PEFT's own merge takes, to the bits, or refuses it by name."""

import json
import shutil
from pathlib import Path

import adapters
import peft
import pytest
import small
import torch
from adapters import ATTENTION, DOWN, UP, by_peft, edited, facts, merged, saved, trained
from safetensors.torch import load_file, save_file

from model.families.nemotron_h import native
from model.weights import lora_config
from model.weights.checkpoint import Checkpoint
from stages.job import StageError
from stages.merge import patterns

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return {"base": small.base(folder / "base", "*E"), "data": small.data(folder / "data")}


@pytest.fixture(scope="module")
def square(tmp_path_factory, made):
    """A base whose up_proj and down_proj have one shape."""
    folder = tmp_path_factory.mktemp("square") / "base"
    folder.mkdir()
    torch.manual_seed(0)
    description = small.tiny.config("*E", 128, 4, 512) | {"moe_intermediate_size": 128}
    small.tiny.save(native.build(description), description, folder)
    return {**made, "base": folder}


@pytest.fixture(scope="module")
def plain(made, tmp_path_factory):
    """A LoRA on attention, to be edited."""
    return saved(tmp_path_factory.mktemp("plain"), trained(made["base"]))


def same_bits(output, base, model):
    """Asserts that the merged files hold what PEFT's merge of the float32 model is, rounded once; the number
    of changed tensors.
    """
    right, found, before = by_peft(base, model), Checkpoint(output), Checkpoint(base)
    wrong = [name for name in right if not torch.equal(right[name], found.tensor(name))]
    assert not wrong
    return sum(not torch.equal(right[name], before.tensor(name)) for name in right)


FEATURES = {
    "rank and alpha patterns": {
        "rank_pattern": {"k_proj": 2, r"0\.mixer\.v_proj": 3, "mixer.experts.up_proj": 5},
        "alpha_pattern": {"^model.layers.0.mixer.q_proj": 3, "experts.down_proj": 5},
        "target_parameters": [UP, DOWN],
    },
    "rsLoRA": {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "target_parameters": [UP, DOWN]},
    "DoRA": {"use_dora": True, "target_modules": [*ATTENTION, "shared_experts.up_proj"]},
    "only up_proj": {"target_parameters": [UP]},
    "only down_proj": {"target_parameters": [DOWN]},
    "one stack of one layer": {"target_parameters": ["layers.1.mixer.experts.down_proj"]},
    "a parameter of a linear": {"target_modules": ["k_proj"], "target_parameters": ["q_proj.weight"]},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "modules_to_save as they were": {"modules_to_save": ["lm_head", "norm_f"]},
    "all linears": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*mixer\.[qv]_proj"},
    "excluded modules": {"exclude_modules": ["k_proj"]},
    "some layers": {
        "target_modules": ["q_proj", "shared_experts.up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    **{f"begun with {how}": {"init_lora_weights": how} for how in ("gaussian", "eva", "orthogonal", False)},
}


@pytest.mark.trap("adapter-setting-ignored")
@pytest.mark.parametrize("feature", FEATURES)
def test_the_merge_has_the_bits_of_peft(made, tmp_path, feature):
    model = trained(made["base"], **FEATURES[feature])
    output = merged(tmp_path, made, saved(tmp_path, model))
    assert same_bits(output, made["base"], model) == facts(output)["merged"] > 0
    assert facts(output)["compared_with_peft"]["equal"] == facts(output)["merged"]


def test_an_adapter_begun_with_mica_is_merged(made, tmp_path):
    model = trained(made["base"], init_lora_weights="mica")
    for name, value in model.named_parameters():
        if "lora_A" in name:
            value.data = 0.05 * torch.randn_like(value)
    same_bits(merged(tmp_path, made, saved(tmp_path, model)), made["base"], model)


@pytest.mark.parametrize("stack", [UP, DOWN])
def test_target_parameters_say_which_stack_it_is_where_the_shapes_do_not(square, tmp_path, stack):
    model = trained(square["base"], target_parameters=[stack])
    output = merged(tmp_path, square, saved(tmp_path, model))
    changed = [
        name
        for name in Checkpoint(output).entries
        if ".experts." in name and not Checkpoint(output).same_bits(name, Checkpoint(square["base"]))
    ]
    assert len(changed) == 4 and all(stack.rpartition(".")[2] in name for name in changed)
    same_bits(output, square["base"], model)


def test_an_adapter_stored_in_bfloat16_is_merged_in_float32(made, tmp_path):
    folder = saved(tmp_path, trained(made["base"]))
    file = folder / "adapter" / WEIGHTS
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    model = peft.PeftModel.from_pretrained(native.load(made["base"]), folder / "adapter")
    same_bits(merged(tmp_path, made, folder), made["base"], model)


def test_a_named_adapter_is_found_in_its_folder(made, tmp_path):
    model = trained(made["base"], name="annie")
    folder = saved(tmp_path, model)
    assert (folder / "adapter" / "annie" / WEIGHTS).exists()
    same_bits(merged(tmp_path, made, folder), made["base"], model)


@pytest.mark.parametrize("name", ["default", "annie"])
def test_the_name_of_the_adapter_may_stand_within_the_keys(made, tmp_path, name):
    model = trained(made["base"], target_modules=ATTENTION, use_dora=True)
    folder = saved(tmp_path, model)
    file = folder / "adapter" / WEIGHTS
    save_file(
        {
            (
                key.replace(".weight", f".{name}.weight")
                if "lora_A" in key or "lora_B" in key
                else f"{key}.{name}"
            ): value
            for key, value in load_file(file).items()
        },
        file,
    )
    same_bits(merged(tmp_path, made, folder), made["base"], model)


def test_an_adapter_in_shards_is_read_whole(made, tmp_path):
    model = trained(made["base"])
    folder = saved(tmp_path, model) / "adapter"
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    table = {key: f"part-{number % 2}.safetensors" for number, key in enumerate(state)}
    for file in set(table.values()):
        save_file({key: value for key, value in state.items() if table[key] == file}, folder / file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": table}))
    same_bits(merged(tmp_path, made, folder.parent), made["base"], model)


def pickled(folder):
    file = folder / "adapter" / WEIGHTS
    torch.save(load_file(file), file.with_name("adapter_model.bin"))
    file.unlink()
    return file.with_name("adapter_model.bin")


def test_code_in_a_pickled_adapter_is_never_run(plain, made, tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder = Path(shutil.copytree(plain, tmp_path / "train"))
    torch.save({f"{QUERY}.lora_A.weight": Touch()}, pickled(folder))
    with pytest.raises(StageError, match=r"adapter_model\.bin is a pickle") as error:
        merged(tmp_path, made, folder)
    assert "safetensors" in error.value.expected
    assert not (tmp_path / "ran").exists()


def test_an_adapter_of_the_hubs_class_may_have_a_rank_for_every_expert(made, tmp_path):
    """PEFT on the hub's own class has a module for every expert, and so may give each its own rank."""
    base = Checkpoint(made["base"])
    torch.manual_seed(5)
    ranks = {"experts.0.up_proj": 2, r"experts\.[12]\.down_proj": 7}
    state, right = {}, {}
    for name in base.entries:
        if ".experts." not in name:
            continue
        module = name.removesuffix(".weight")
        rank = (
            2
            if module.endswith("experts.0.up_proj")
            else 7
            if module.endswith(("experts.1.down_proj", "experts.2.down_proj"))
            else 4
        )
        out, inside = base.entries[name].shape
        a, b = torch.randn(rank, inside), 0.05 * torch.randn(out, rank)
        state |= {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        }
        right[name] = (base.tensor(name).float() + (b @ a) * (8 / rank)).bfloat16()
    folder = tmp_path / "adapter"
    peft.LoraConfig(
        r=4, lora_alpha=8, rank_pattern=ranks, target_modules=r".*experts\.\d+\.(up|down)_proj"
    ).save_pretrained(folder)
    save_file(state, folder / WEIGHTS)
    found = Checkpoint(merged(tmp_path, made, tmp_path))
    assert right and all(torch.equal(right[name], found.tensor(name)) for name in right)


@pytest.mark.trap("adapter-that-changed-its-base")
@pytest.mark.parametrize(
    "how", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "OLoRA", "something new"]
)
def test_a_beginning_that_changes_the_base_is_refused_by_name(made, plain, tmp_path, how):
    folder = edited(Path(shutil.copytree(plain, tmp_path / "train")), init_lora_weights=how)
    with pytest.raises(StageError, match=f'init_lora_weights .* is "{how}"') as error:
        merged(tmp_path, made, folder)
    assert ("path_initial_model_for_weight_conversion" in error.value.remedy) == (
        how not in ("loftq", "something new")
    )


@pytest.mark.trap("adapter-that-changed-its-base")
def test_pissa_is_refused_as_peft_saves_it_and_merged_once_converted(made, tmp_path):
    """Case 24: PiSSA belongs on the base without its principal part; PEFT turns it into a plain LoRA."""
    model = peft.get_peft_model(
        native.load(made["base"]),
        peft.LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION, init_lora_weights="pissa"),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "begun")
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data += 0.01 * torch.randn_like(value)
    model.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(StageError, match='is "pissa"'):
        merged(tmp_path, made, saved(tmp_path / "as-it-is", model))
    model.save_pretrained(
        tmp_path / "converted" / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "begun")
    )
    (tmp_path / "2").mkdir()
    output = merged(tmp_path / "2", made, tmp_path / "converted")
    right = by_peft(
        made["base"],
        peft.PeftModel.from_pretrained(native.load(made["base"]), tmp_path / "converted" / "adapter"),
    )
    assert all(torch.equal(right[name], Checkpoint(output).tensor(name)) for name in right)


@pytest.mark.parametrize(
    "kind", ["IA3", "LOHA", "LOKR", "VERA", "ADALORA", "OFT", "BOFT", "PREFIX_TUNING", None]
)
def test_another_method_is_refused_by_name(made, plain, tmp_path, kind):
    folder = edited(Path(shutil.copytree(plain, tmp_path / "train")), peft_type=kind)
    with pytest.raises(StageError, match=f"peft_type .* is {kind!r}"):
        merged(tmp_path, made, folder)


VALUES = {
    "alora_invocation_tokens": [10, 20],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 1]],
    "megatron_config": {"a": 1},
    "fan_in_fan_out": True,
    "lora_bias": True,
    "use_qalora": True,
    "monteclora_config": {"num_samples": 8},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"a": 1},
    "velora_config": {"num_groups": 64},
    "ensure_weight_tying": True,
    "a_field_of_tomorrow": 3,
}


@pytest.mark.trap("adapter-setting-ignored")
@pytest.mark.parametrize("field", VALUES)
def test_a_field_that_changes_the_meaning_is_refused_by_name_and_value(made, plain, tmp_path, field):
    folder = edited(Path(shutil.copytree(plain, tmp_path / "train")), **{field: VALUES[field]})
    with pytest.raises(StageError, match=f"{field} in adapter_config.json is ") as error:
        merged(tmp_path, made, folder)
    assert json.dumps(VALUES[field]) in error.value.found and error.value.remedy


@pytest.mark.trap("adapter-setting-ignored")
def test_every_field_of_pefts_configuration_has_its_kind():
    fields = set(peft.LoraConfig().to_dict()) | {"runtime_config"}
    kinds = [lora_config.UNDERSTOOD, lora_config.NO_EFFECT, set(lora_config.DEFAULTS)]
    assert set().union(*kinds) == fields and sum(map(len, kinds)) == len(fields)
    assert {
        key: value for key, value in peft.LoraConfig().to_dict().items() if key in lora_config.DEFAULTS
    } == lora_config.DEFAULTS


def break_config(folder):
    (folder / "adapter_config.json").write_text("{")


def drop(name):
    return lambda folder: (folder / name).unlink()


def tensors(change):
    """What alters the tensors of an adapter's file."""

    def alter(folder):
        state = load_file(folder / WEIGHTS)
        save_file({key: value.clone() for key, value in change(state).items()}, folder / WEIGHTS)

    return alter


QUERY = "base_model.model.model.layers.0.mixer.q_proj"
BROKEN = {
    "no configuration": (drop("adapter_config.json"), "there is no adapter_config.json"),
    "no tensors": (drop(WEIGHTS), r"there is no adapter_model\.safetensors"),
    "a configuration cut off": (break_config, "cannot be read as JSON"),
    "a list as configuration": (
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        "holds a list",
    ),
    "a file cut off": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]),
        "is truncated",
    ),
    "one half of a pair": (
        tensors(lambda state: {k: v for k, v in state.items() if k != f"{QUERY}.lora_A.weight"}),
        "q_proj has lora_B only",
    ),
    "another rank": (
        tensors(lambda state: {k: v[:2] if "q_proj.lora_A" in k else v for k, v in state.items()}),
        r"q_proj\.lora_A\.weight has shape \(2, 128\)",
    ),
    "a magnitude without DoRA": (
        tensors(lambda state: {**state, f"{QUERY}.lora_magnitude_vector": torch.ones(128)}),
        "magnitude_vector is there, and use_dora",
    ),
    "an embedding's LoRA": (
        tensors(
            lambda state: {**state, "base_model.model.model.embeddings.lora_embedding_A": torch.ones(4, 512)}
        ),
        "embeddings.lora_embedding_A is not a tensor that a merge knows",
    ),
    "a name of wrappers alone": (
        tensors(lambda state: {**state, f"{QUERY}{40 * '.modules_to_save'}.": torch.ones(128)}),
        "modules_to_save. is not a tensor that a merge knows",
    ),
    "a bias's LoRA": (
        tensors(lambda state: {**state, f"{QUERY}.lora_B.bias": torch.ones(128)}),
        r"lora_B\.bias is not a tensor that a merge knows",
    ),
    "two adapters in a file": (
        tensors(lambda state: {**state, f"{QUERY}.lora_A.other.weight": state[f"{QUERY}.lora_A.weight"]}),
        "are of two adapters",
    ),
    "another model's layer": (
        tensors(lambda state: {k.replace("layers.0", "layers.9"): v for k, v in state.items()}),
        "layers.9.* matches no tensor",
    ),
    "a module that is not targeted": (
        tensors(
            lambda state: {
                **state,
                **{
                    k.replace("q_proj", "shared_experts.up_proj").replace("layers.0", "layers.1"): v
                    for k, v in state.items()
                    if "q_proj" in k
                },
            }
        ),
        r"PEFT would leave .*shared_experts\.up_proj\.lora_A\.weight out",
    ),
    "a number that is none": (
        tensors(lambda state: {k: v * float("nan") if "q_proj.lora_A" in k else v for k, v in state.items()}),
        "q_proj.weight is not finite",
    ),
    "a changed copy of the base": (
        tensors(lambda state: {**state, "base_model.model.lm_head.weight": torch.ones(512, 128)}),
        r"lm_head\.weight differs from lm_head\.weight of the base",
    ),
    "a copy of another model": (
        tensors(lambda state: {**state, "base_model.model.score.weight": torch.ones(2, 128)}),
        r"score\.weight is not a tensor of the checkpoint",
    ),
    "a larger vocabulary": (
        tensors(lambda state: {**state, "base_model.model.lm_head.weight": torch.ones(513, 128)}),
        r"lm_head\.weight has shape \(513, 128\)",
    ),
    "no LoRA at all": (
        tensors(lambda state: {"base_model.model.model.norm_f.weight": torch.ones(128)}),
        "no LoRA tensor",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_adapter_is_refused_with_what_was_found_expected_and_to_do(made, plain, tmp_path, fault):
    folder = Path(shutil.copytree(plain, tmp_path / "train"))
    change, words = BROKEN[fault]
    change(folder / "adapter")
    with pytest.raises(StageError, match=words) as error:
        merged(tmp_path, made, folder)
    assert error.value.expected and error.value.remedy


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": "8"},
        {"lora_alpha": float("nan")},
        {"rank_pattern": {"q_proj": 1.5}},
        {"alpha_pattern": {"(": 1}},
        {"target_parameters": "all"},
    ],
)
def test_a_number_or_name_that_is_none_is_refused(made, plain, tmp_path, changes):
    folder = edited(Path(shutil.copytree(plain, tmp_path / "train")), **changes)
    with pytest.raises(StageError, match=next(iter(changes)) + "|pattern"):
        merged(tmp_path, made, folder)


ENDLESS = r"(\w+\.?)+!"
EXPRESSIONS = {
    "target_modules": ENDLESS,
    "exclude_modules": ENDLESS,
    "rank_pattern": {ENDLESS: 2},
    "alpha_pattern": {ENDLESS: 2},
    "layers_pattern": [ENDLESS],
}


@pytest.mark.parametrize("field", EXPRESSIONS)
def test_an_expression_that_would_never_end_is_refused(made, plain, tmp_path, monkeypatch, field):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    changes = {field: EXPRESSIONS[field], "layers_to_transform": [0]}
    folder = edited(Path(shutil.copytree(plain, tmp_path / "train")), **changes)
    with pytest.raises(StageError) as error:
        merged(tmp_path, made, folder)
    assert f"{ENDLESS!r} of {field} in adapter_config.json is no expression that ends" in error.value.found


@pytest.mark.parametrize(
    "changes", [{"target_modules": "(q_proj"}, {"rank_pattern": {"(?i)q_proj": 2}}], ids=["broken", "inside"]
)
def test_what_peft_cannot_compile_is_no_regular_expression(made, plain, tmp_path, changes):
    folder = edited(Path(shutil.copytree(plain, tmp_path / "train")), **changes)
    with pytest.raises(StageError, match="q_proj.* is no regular expression: "):
        merged(tmp_path, made, folder)


def test_several_named_adapters_are_named(made, plain, tmp_path):
    for name in ("annie", "other"):
        shutil.copytree(plain / "adapter", tmp_path / "train" / "adapter" / name)
    with pytest.raises(StageError, match="holds 2 adapters: annie, other"):
        merged(tmp_path, made, tmp_path / "train")


def test_stacks_that_target_parameters_do_not_name_are_refused(made, tmp_path):
    folder = edited(
        saved(tmp_path, trained(made["base"], target_parameters=[UP, DOWN])), target_parameters=[DOWN]
    )
    with pytest.raises(
        StageError, match=r"the adapter has .*experts\.base_layer, and target_parameters .* is "
    ):
        merged(tmp_path, made, folder)


@pytest.mark.parametrize("what", ["lm_head.base_layer", "norm_f"])
def test_a_module_that_was_trained_whole_is_refused_by_name(made, tmp_path, what):
    """Case 31: PEFT saves lm_head beside a LoRA on it; one that is not the base's is a change that LoRA does
    not say.
    """
    settings = (
        {"target_modules": ["lm_head", "q_proj"]} if what != "norm_f" else {"modules_to_save": ["norm_f"]}
    )
    folder = saved(tmp_path, trained(made["base"], **settings))
    tensors(lambda state: {k: v + 0.1 if f"{what}.weight" in k else v for k, v in state.items()})(
        folder / "adapter"
    )
    with pytest.raises(StageError, match=f"{what}.weight differs from"):
        merged(tmp_path, made, folder)


def test_a_module_to_save_of_which_nothing_is_stored_is_refused(made, plain, tmp_path):
    with pytest.raises(StageError, match="modules_to_save in adapter_config.json names norm_f"):
        merged(
            tmp_path,
            made,
            edited(Path(shutil.copytree(plain, tmp_path / "train")), modules_to_save=["norm_f"]),
        )


def test_dora_on_stacks_is_refused_as_peft_refuses_it(made, tmp_path):
    folder = edited(
        saved(tmp_path, trained(made["base"], target_modules=[], target_parameters=[UP])), use_dora=True
    )
    stack = "base_model.model.model.layers.1.mixer.experts"
    tensors(lambda state: {**state, f"{stack}.lora_magnitude_vector": torch.ones(64)})(folder / "adapter")
    with pytest.raises(StageError, match="use_dora in adapter_config.json is true, and .*experts is a stack"):
        merged(tmp_path, made, folder)


def test_what_the_adapter_stores_nothing_for_is_warned_of_or_refused(made, plain, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(plain, tmp_path / "train"))
    tensors(lambda state: {k: v for k, v in state.items() if "q_proj" not in k})(folder / "adapter")
    messages = adapters.warnings(monkeypatch)
    merged(tmp_path, made, folder)
    assert any(
        "stores nothing, first backbone.layers.0.mixer.q_proj.weight" in message for message in messages
    )
    (tmp_path / "2").mkdir()
    with pytest.raises(StageError, match="stores nothing for backbone.layers.0.mixer.q_proj.weight"):
        merged(tmp_path / "2", made, edited(folder, init_lora_weights=False))
