"""What a family says of itself: linears as records, names both ways, and who may know them."""

import json
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from model import layouts
from model.families import registry, serve
from model.families.family import FamilyError
from model.families.nemotron_h import fields, targets
from model.families.nemotron_h.family import NEMOTRON_H
from model.families.unknown import ConfigError, UnknownFamily

REPO = Path(__file__).resolve().parents[2]
NANO = json.loads((Path(__file__).parent / "golden" / "nano-config.json").read_text())

# What is one family's own: names of its tensors and modules, of its activation, of its parsers.
OWN = re.compile(r"backbone|_proj|relu2|qwen3_coder|qwen3_xml|nemotron_v3|nano_v3")
# Modules of model/layers that bind to the native class read its attributes by their names.
BOUND = {"model/layers/structure.py", "model/layers/mamba.py", "model/layers/experts.py"}


def test_linears_have_their_kind_shape_and_place():
    found = {linear.name: linear for linear in NEMOTRON_H.linears(NANO)}
    assert Counter(linear.kind for linear in found.values()) == {
        "expert": 23 * 128 * 2,
        "shared expert": 23 * 2,
        "mamba": 23 * 2,
        "attention": 6 * 4,
    }
    expert = found["backbone.layers.1.mixer.experts.7.up_proj"]
    assert (expert.layer, expert.index, expert.out, expert.inside) == (1, 7, 1856, 2688)
    assert expert.module == "model.layers.1.mixer.experts.up_proj"
    assert expert.part == "mixer.experts.up_proj"
    query = found["backbone.layers.5.mixer.q_proj"]
    assert (query.layer, query.index, query.module) == (5, None, "model.layers.5.mixer.q_proj")


def test_loaders_fuse_the_experts_of_a_layer_and_q_k_v():
    groups = Counter(linear.group for linear in NEMOTRON_H.linears(NANO))
    assert Counter(groups.values()) == {256: 23, 3: 6, 1: 6 + 23 * 2 + 23 * 2}


def test_linears_are_in_the_order_of_the_checkpoint():
    weights = {linear.weight for linear in NEMOTRON_H.linears(NANO)}
    in_order = [name for name in NEMOTRON_H.tensors(NANO) if name in weights]
    assert in_order == [linear.weight for linear in NEMOTRON_H.linears(NANO)]


def test_names_go_both_ways():
    for linear in NEMOTRON_H.linears(NANO):
        assert NEMOTRON_H.native(linear.name) == linear.module
        if linear.index is None:
            assert NEMOTRON_H.hub(linear.module) == linear.name
    stacked = {linear.weight for linear in NEMOTRON_H.linears(NANO) if linear.index is not None}
    for name in NEMOTRON_H.tensors(NANO).keys() - stacked:
        native = NEMOTRON_H.native(name)
        assert NEMOTRON_H.hub(native) == name
        assert (NEMOTRON_H.native(native), NEMOTRON_H.hub(name)) == (native, name)  # stay as they are


def test_a_tensor_has_the_same_name_in_another_layer_but_for_its_number():
    name = "backbone.layers.11.mixer.experts.11.up_proj.weight"
    assert NEMOTRON_H.layer(name) == 11 and NEMOTRON_H.layer("lm_head.weight") is None
    assert NEMOTRON_H.in_layer(name, 0) == "backbone.layers.0.mixer.experts.11.up_proj.weight"


@pytest.mark.parametrize("preset", NEMOTRON_H.presets)
def test_a_preset_in_pefts_words_is_its_linears(preset):
    chosen = targets.targets(NANO, preset)
    suffixes = tuple(f".{suffix}" for suffix in (*chosen.target_modules, *chosen.target_parameters))
    expected = {x.name for x in NEMOTRON_H.linears(NANO) if x.module.endswith(suffixes)}
    assert {linear.name for linear in NEMOTRON_H.targeted(NANO, preset)} == expected != set()


def test_recipes_may_choose_what_the_family_has():
    def choices(stage, name):
        return tomllib.loads((REPO / f"stages/{stage}/stage.toml").read_text())["parameters"][name]["choices"]

    assert set(choices("train", "targets")) == set(NEMOTRON_H.presets)
    assert set(choices("quantize", "layout")) == set(NEMOTRON_H.layouts)


def test_an_unknown_preset_is_refused():
    with pytest.raises(FamilyError, match="there is no target preset"):
        NEMOTRON_H.targeted(NANO, "everything")


@pytest.mark.parametrize("of", [registry.of, serve.of])
@pytest.mark.parametrize(
    ("config", "found"), [({"model_type": "llama"}, "model_type 'llama'"), ({}, "no model_type")]
)
def test_a_model_of_no_family_is_refused_by_name(of, config, found):
    with pytest.raises(UnknownFamily) as error:
        of(config)
    assert found in error.value.found and error.value.expected == "'nemotron_h'" and error.value.remedy


WRONG = (0, -1, 1.5, 1e12, 10**30, "2688", True, None, [1], float("nan"), float("inf"))


@pytest.mark.parametrize("name", fields.SIZES)
def test_a_size_that_no_model_has_is_refused_by_name(name):
    for value in WRONG:
        with pytest.raises(ConfigError, match=f"{name} in config.json is") as error:
            registry.of({**NANO, name: value})
        assert error.value.expected and error.value.remedy


@pytest.mark.parametrize("name", fields.NUMBERS)
def test_a_number_that_no_model_has_is_refused_by_name(name):
    for value in (-1, "1", True, None, [1], float("nan"), float("inf"), 10**400):
        with pytest.raises(ConfigError, match=f"{name} in config.json is"):
            registry.of({**NANO, name: value})


def test_a_config_that_names_tensors_without_end_is_refused_before_they_are_listed():
    for changes in (
        {"hybrid_override_pattern": "M" * 10**6},
        {"hybrid_override_pattern": ["M"]},
        {"hybrid_override_pattern": "E" * 500, "n_routed_experts": 2000},
    ):
        with pytest.raises(ConfigError, match="hybrid_override_pattern|n_routed_experts"):
            registry.of({**NANO, **changes})


def test_a_layout_is_worked_out_once(monkeypatch):
    asked = []
    counting = NEMOTRON_H.__class__(
        **{
            **vars(NEMOTRON_H),
            "quantised": lambda config, layout: asked.append(layout) or NEMOTRON_H.quantised(config, layout),
        }
    )
    monkeypatch.setitem(registry.FAMILIES, "nemotron_h", counting)
    config = NANO | {"comment": "no other test's"}
    layouts.tensors(config, "nvidia")
    layouts.hf_quant_config(config, "nvidia", "FP8", "0")
    assert layouts.quantised(config, "nvidia") and asked == ["nvidia"]


def test_nothing_outside_the_families_knows_a_name_of_one_of_them():
    knowing = {
        str(path.relative_to(REPO))
        for room in ("model", "stages", "forge")
        for path in (REPO / room).rglob("*")
        if path.suffix in (".py", ".toml", ".json", ".j2")
        and not path.is_relative_to(REPO / "model" / "families")
        and OWN.search(path.read_text())
    }
    assert knowing == BOUND


def test_whoever_drives_a_model_asks_its_family():
    importers = {
        str(path.relative_to(REPO))
        for room in ("model", "stages")
        for path in (REPO / room).rglob("*.py")
        if not path.is_relative_to(REPO / "model" / "families")
        and re.search(r"import.*nemotron_h|nemotron_h.* import", path.read_text())
    }
    # What makes a NemotronH of its own: the small base, and the shape that kernels are compiled for.
    assert importers == {
        "stages/base/make.py",
        "stages/base/teach.py",
        "stages/base/tiny.py",
        "stages/train/warm.py",
    }
