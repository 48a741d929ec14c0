"""The audit of any checkpoint: whole ones pass in every layout, and each fault is named."""

import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
from packed import quantised, tensors, written

from model import faults, layouts
from model.checkpoint_audit import QUANT, audit
from model.families.nemotron_h import names
from model.families.nemotron_h.family import NEMOTRON_H
from model.families.nemotron_h.layout import LAYOUTS
from model.weights import nvfp4, quant_config
from model.weights.checkpoint import DTYPES, INDEX, Checkpoint

REPO, GOLDEN = Path(__file__).resolve().parents[2], Path(__file__).parent / "golden"
EXPERT, OTHER = "backbone.layers.1.mixer.experts.0", "backbone.layers.1.mixer.experts.2"
BIAS, EMBEDDINGS = "backbone.layers.1.mixer.gate.e_score_correction_bias", "backbone.embeddings.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small.base(tmp_path_factory.mktemp("source") / "base")


def edited(folder, copy, change, file=QUANT):
    """A copy whose JSON file `file` is changed."""
    shutil.copytree(folder, copy)
    found = json.loads((copy / file).read_text())
    change(found)
    (copy / file).write_text(json.dumps(found))
    return copy


@pytest.fixture(scope="module")
def nvidia(base, tmp_path_factory):
    return quantised(base, tmp_path_factory.mktemp("nvidia") / "made", "nvidia")


def subjects(folder, **more):
    return {f.subject for f in audit(folder, **more).findings}


# --- what is whole ------------------------------------------------------------------------------------------


def test_a_bf16_checkpoint_passes(base):
    made = audit(base, base)
    assert (
        made.findings == []
        and made.facts["format"] == "BF16"
        and made.facts["layout"] is None
        and made.facts["tensors"] == 52
    )


@pytest.mark.parametrize("chosen", LAYOUTS)
def test_each_layout_passes_and_is_recognised(base, tmp_path, chosen):
    folder = quantised(base, tmp_path / "made", chosen)
    made = audit(folder, base)
    config = Checkpoint(base).config
    assert made.findings == []
    assert made.facts | {"files": 0, "bytes": 0} == {
        "format": "NVFP4",
        "layout": chosen,
        "dtypes": NEMOTRON_H.precisions[0],
        "kv_cache": "FP8",
        "tensors": len(Checkpoint(folder).entries),
        "files": 0,
        "bytes": 0,
        "quantised": len(layouts.quantised(config, chosen)),
        "excludes": len(layouts.excluded(config, chosen)),
        "compared": made.facts["compared"],
    }


def test_nvidia_s_own_dtypes_are_named_and_pass(base, tmp_path):
    def recast(values):
        for name in values:
            if name.endswith((".A_log", ".D")):
                values[name] = values[name].bfloat16()
            if name.endswith(".gate.weight"):
                values[name] = values[name].float()

    made = audit(quantised(base, tmp_path / "made", "nvidia", recast))
    assert made.findings == [] and made.facts["dtypes"] == NEMOTRON_H.precisions[1]


def test_a_layout_that_is_none_of_ours_passes_if_all_agree(nvidia, base, tmp_path):
    """ModelOpt's own preset: every Mamba projection quantised."""
    config = Checkpoint(base).config
    values = tensors(nvidia)
    for name in ("backbone.layers.2.mixer.in_proj", "backbone.layers.2.mixer.out_proj"):
        packed = nvfp4.pack(values[f"{name}.weight"])
        values |= {
            f"{name}.weight": packed.weight,
            f"{name}.weight_scale": packed.weight_scale,
            f"{name}.weight_scale_2": packed.weight_scale_2,
            f"{name}.input_scale": torch.tensor(0.01),
        }
    quant = json.loads((nvidia / QUANT).read_text())
    quant["quantization"]["exclude_modules"] = [
        n
        for n in quant["quantization"]["exclude_modules"]
        if ".layers.2.mixer.in" not in n and ".layers.2.mixer.out" not in n
    ]
    made = audit(written(tmp_path / "made", config, values, quant))
    assert made.findings == [] and made.facts["layout"] == "other"


def test_settings_inside_config_json_and_patterns_among_the_excludes(nvidia, tmp_path):
    """As ModelOpt writes them: `ignore` with patterns, and the scheme of the cache."""
    folder = edited(
        nvidia,
        tmp_path / "made",
        lambda config: config.update(
            quantization_config={
                "quant_method": "modelopt",
                "quant_algo": "NVFP4",
                "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 4, "group_size": 16}, "targets": ["Linear"]}
                },
                "ignore": [
                    "lm_head",
                    "backbone.layers.0.mixer.conv1d",
                    "backbone.layers.2.mixer*",
                    "backbone.layers.3.*",
                ],
            }
        ),
        "config.json",
    )
    (folder / QUANT).unlink()
    made = audit(folder)
    assert made.findings == [] and (made.facts["kv_cache"], made.facts["excludes"]) == ("FP8", 4)


def test_a_weight_only_export_passes_as_what_it_is(base, tmp_path):
    folder = quantised(base, tmp_path / "made", "nvidia", weight_only=True)
    made = audit(folder, vllm="0.31.0")
    assert made.findings == [] and made.facts["format"] == "W4A16_NVFP4"
    assert (made.facts["kv_cache"], made.facts["excludes"]) == (
        "FP8",
        len(layouts.excluded(Checkpoint(base).config, "nvidia")),
    )
    assert made.serve.args[-4:] == ["--kv-cache-dtype", "fp8", "--moe-backend", "marlin"]
    alone = edited(
        folder, tmp_path / "alone", lambda config: config.pop("quantization_config"), "config.json"
    )
    as_nvfp4 = edited(
        alone, tmp_path / "broken", lambda quant: quant["quantization"].update(quant_algo="NVFP4")
    )
    assert [(f.subject, f.found) for f in audit(as_nvfp4).findings] == [
        (QUANT, "quant_algo NVFP4, and no input_scale in the files")
    ]


def test_weights_alone_whose_settings_no_vllm_reads_are_named(base, tmp_path):
    folder = quantised(base, tmp_path / "made", "nvidia", weight_only=True)
    alone = edited(
        folder, tmp_path / "alone", lambda config: config.pop("quantization_config"), "config.json"
    )
    (finding,) = audit(alone, base).findings
    assert (finding.subject, finding.found) == (
        QUANT,
        "quant_algo W4A16_NVFP4, and no quantization_config in config.json",
    )
    assert "Every vLLM refuses" in finding.remedy and "config.json" in finding.remedy
    (folder / QUANT).unlink()
    assert audit(folder, base).findings == []  # config.json is enough for vLLM


def test_the_published_layout_of_the_whole_model_passes_from_its_headers(tmp_path, monkeypatch):
    """NVIDIA's own NVFP4 checkpoint to the tensor and the byte, in a file without data."""
    config = json.loads((GOLDEN / "nano-config.json").read_text())
    specs = layouts.packed_tensors(
        names.tensors(config, names.FLOAT32_NVFP4), layouts.quantised(config, "nvidia")
    )
    table, at = {}, 0
    for name, spec in specs.items():
        end = at + math.prod(spec.shape) * DTYPES[spec.dtype].itemsize
        table[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [at, end]}
        at = end
    head = json.dumps(table).encode()
    with (tmp_path / "model.safetensors").open("wb") as opened:
        opened.write(struct.pack("<Q", len(head)) + head)
        opened.truncate(8 + len(head) + at)
    for source, target in (("nano-config.json", "config.json"), ("nano-hf_quant_config.json", QUANT)):
        shutil.copyfile(GOLDEN / source, tmp_path / target)
    monkeypatch.setattr(faults, "scales", lambda checkpoint, expected: [])
    made = audit(tmp_path)
    assert made.findings == []
    assert made.facts == {
        "format": "NVFP4",
        "layout": "nvidia",
        "dtypes": NEMOTRON_H.precisions[1],
        "kv_cache": "FP8",
        "tensors": 24_147,
        "files": 1,
        "bytes": 19_339_781_632,
        "quantised": 5968,
        "excludes": 60,
        "compared": None,
    }


# --- what is broken -----------------------------------------------------------------------------------------


def without_scales(values, module):
    for part in layouts.PARTS:
        del values[f"{module}.{part}"]


def set_to(name, value):
    return lambda values: values.update({name: value})


BREAKS = {
    "a missing scale": (lambda v: v.pop(f"{EXPERT}.up_proj.input_scale"), f"{EXPERT}.up_proj.input_scale"),
    "a NaN scale": (
        set_to(f"{EXPERT}.up_proj.weight_scale_2", torch.tensor(float("nan"))),
        f"{EXPERT}.up_proj.weight_scale_2",
    ),
    "a zero scale": (
        set_to(f"{EXPERT}.up_proj.input_scale", torch.tensor(0.0)),
        f"{EXPERT}.up_proj.input_scale",
    ),
    "a NaN among the scales of a weight": (
        lambda v: v[f"{EXPERT}.up_proj.weight_scale"].view(torch.uint8)[3, 1].fill_(127),
        f"{EXPERT}.up_proj.weight_scale",
    ),
    "a zero among the scales of a weight": (
        lambda v: v[f"{EXPERT}.up_proj.weight_scale"].view(torch.uint8)[3, 1].fill_(0),
        f"{EXPERT}.up_proj.weight_scale",
    ),
    "a negative scale": (
        lambda v: v[f"{EXPERT}.up_proj.weight_scale"].view(torch.uint8)[3, 1].fill_(130),
        f"{EXPERT}.up_proj.weight_scale",
    ),
    "a weight_scale_2 of shape (1,)": (
        set_to(f"{EXPERT}.up_proj.weight_scale_2", torch.ones(1)),
        f"{EXPERT}.up_proj.weight_scale_2",
    ),
    "a transposed expert": (
        lambda v: v.update({f"{EXPERT}.down_proj.weight": v[f"{EXPERT}.down_proj.weight"].T.contiguous()}),
        f"{EXPERT}.down_proj.weight",
    ),
    "an expert without any scale": (lambda v: without_scales(v, f"{OTHER}.down_proj"), f"{OTHER}.down_proj"),
    "A_log rounded to BF16": (
        lambda v: v.update({"backbone.layers.0.mixer.A_log": v["backbone.layers.0.mixer.A_log"].bfloat16()}),
        "backbone.layers.0.mixer.A_log",
    ),
    "a control character": (lambda v: v.update({"lm_head\0.weight": torch.ones(1)}), r"'lm_head\x00.weight'"),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_a_broken_tensor_is_the_one_that_is_named(base, tmp_path, fault):
    change, subject = BREAKS[fault]
    assert subjects(quantised(base, tmp_path / "made", "nvidia", change), base=base) == {subject}


def test_a_transposed_expert_is_called_so(base, tmp_path):
    (finding,) = audit(
        quantised(base, tmp_path / "made", "nvidia", BREAKS["a transposed expert"][0])
    ).findings
    assert "transposed" in finding.remedy


@pytest.mark.trap("renamed-and-recast-tensors")
def test_a_renamed_embedding(base, tmp_path):
    values = tensors(base)
    values["backbone.embedding.weight"] = values.pop(EMBEDDINGS)
    assert subjects(written(tmp_path / "made", Checkpoint(base).config, values)) == {
        EMBEDDINGS,
        "backbone.embedding.weight",
    }


@pytest.mark.trap("renamed-and-recast-tensors")
def test_float32_that_save_pretrained_rounded(base, tmp_path):
    """NVIDIA's NVFP4 checkpoint has A_log and D in BF16; the BF16 one does not."""
    values = {n: v.bfloat16() if n.endswith(".A_log") else v for n, v in tensors(base).items()}
    assert subjects(written(tmp_path / "made", Checkpoint(base).config, values)) == {
        f"backbone.layers.{n}.mixer.A_log" for n in (0, 2)
    }


def test_an_expert_that_stayed_bf16(base, tmp_path):
    def kept(values):
        without_scales(values, f"{OTHER}.down_proj")
        values[f"{OTHER}.down_proj.weight"] = Checkpoint(base).tensor(f"{OTHER}.down_proj.weight")

    found = audit(quantised(base, tmp_path / "made", "nvidia", kept))
    assert found.facts["layout"] == "nvidia"  # one odd expert is a fault, not a layout
    assert {f.subject for f in found.findings} == {f"{OTHER}.down_proj.weight", f"{OTHER}.down_proj", QUANT}


EXCLUDES = {
    "a control character": (
        lambda names: names.__setitem__(0, "lm_head.\0backbone.pt_name_sentinel"),
        ["control character", "no exclude for lm_head"],
    ),
    "one for a quantised layer": (
        lambda names: names.append(f"{EXPERT}.up_proj"),
        [f"the exclude {EXPERT}.up_proj, which is quantised"],
    ),
    "a part of a quantised layer's name": (
        lambda names: names.append("backbone.layers.1.mixer.exp"),
        [f"quantised in the files ({EXPERT}.up_proj and 7 more)"],
    ),
    "one too few": (
        lambda names: names.remove("backbone.layers.3.mixer.q_proj"),
        ["no exclude for backbone.layers.3.mixer.q_proj"],
    ),
    "one for no module": (
        lambda names: names.append("backbone.layers.9.mixer.q_proj"),
        ["no module of this checkpoint"],
    ),
}


@pytest.mark.trap("corrupted-names")
@pytest.mark.parametrize("fault", EXCLUDES)
def test_a_wrong_exclude_is_named(nvidia, tmp_path, fault):
    change, said = EXCLUDES[fault]
    found = audit(
        edited(nvidia, tmp_path / "made", lambda quant: change(quant["quantization"]["exclude_modules"]))
    ).findings
    assert {f.subject for f in found} == {QUANT} and len(found) == len(said)
    assert all(any(words in str(f) for f in found) for words in said)


SETTINGS = {
    "another algorithm": (lambda quant: quant.update(quant_algo="FP8"), "quant_algo FP8"),
    "another group": (lambda quant: quant.update(group_size=32), "group_size 32"),
    "a key that vLLM asks for": (lambda quant: quant.pop("kv_cache_quant_algo"), "no kv_cache_quant_algo"),
    "excludes that are no list": (lambda quant: quant.update(exclude_modules="lm_head"), "not a list"),
}


@pytest.mark.parametrize("fault", SETTINGS)
def test_wrong_settings_are_named(nvidia, tmp_path, fault):
    change, said = SETTINGS[fault]
    (finding,) = audit(
        edited(nvidia, tmp_path / "made", lambda quant: change(quant["quantization"]))
    ).findings
    assert said in finding.found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kv_cache_scheme": {"type": ["float"], "num_bits": 8}}, "KV cache"),
        ({"kv_cache_scheme": "FP8"}, "kv_cache_scheme of config.json is 'FP8', expected a table"),
        ({"kv_cache_scheme": None, "kv_cache_quant_algo": 8}, "is 8, expected a name or null"),
        ({"group_size": "16"}, "group_size of config.json is '16', expected a whole number"),
        ({"group_size": True}, "group_size of config.json is True"),
        ({"config_groups": ["group_0"]}, "config_groups of config.json is ['group_0'], expected a table"),
        ({"config_groups": {"group_0": 4}}, "group_0 of config.json is 4, expected a table"),
        ({"config_groups": {"group_0": {"weights": 4}}}, "weights of config.json is 4, expected a table"),
    ],
)
def test_a_setting_of_another_type_is_a_finding_and_no_traceback(nvidia, tmp_path, given, said):
    inside = quant_config.for_config_json(json.loads((nvidia / QUANT).read_text()))
    made = edited(
        nvidia,
        tmp_path / "made",
        lambda config: config.update(quantization_config=inside | given),
        "config.json",
    )
    findings = audit(made).findings
    assert findings and any(said in str(finding) for finding in findings), findings


def test_two_settings_that_differ_and_none_at_all(nvidia, base, tmp_path):
    inside = quant_config.for_config_json(json.loads((nvidia / QUANT).read_text()))
    both = edited(
        nvidia, tmp_path / "both", lambda config: config.update(quantization_config=inside), "config.json"
    )
    assert subjects(both) == set()
    other = {"ignore": [*inside["ignore"], "backbone.layers.1.mixer.gate"], "kv_cache_scheme": None}
    for key, value in other.items():
        assert subjects(
            edited(
                nvidia,
                tmp_path / key,
                lambda config, key=key, value=value: config.update(quantization_config=inside | {key: value}),
                "config.json",
            )
        ) == {QUANT}
    (both / QUANT).unlink()
    shutil.copyfile(nvidia / "config.json", both / "config.json")
    assert [f.found for f in audit(both).findings] == [
        "no such file, and no quantization_config in config.json"
    ]
    shutil.copytree(base, tmp_path / "bf16")
    shutil.copyfile(nvidia / QUANT, tmp_path / "bf16" / QUANT)
    assert [f.found for f in audit(tmp_path / "bf16").findings] == [
        "NVFP4, and no quantised linear in the files"
    ]


# --- against a base -----------------------------------------------------------------------------------------


@pytest.mark.trap("router-in-bf16")
@pytest.mark.parametrize("name", [BIAS, "backbone.layers.3.mixer.q_proj.weight", "backbone.layers.0.mixer.D"])
def test_what_is_not_quantised_equals_the_base_bit_for_bit(base, tmp_path, name):
    def next_up(values):
        values[name] = torch.nextafter(values[name], torch.full_like(values[name], 1e4))

    folder = quantised(base, tmp_path / "made", "nvidia", next_up)
    assert subjects(folder) == set() and subjects(folder, base=base) == {name}


def test_an_adapter_may_change_projections_of_a_bf16_base_and_nothing_else(base, tmp_path):
    values = tensors(base)
    values["backbone.layers.3.mixer.q_proj.weight"] += 1
    merged = written(tmp_path / "merged", Checkpoint(base).config, values)
    assert subjects(merged, base=base) == set()
    values[BIAS] += 1
    assert subjects(written(tmp_path / "broken", Checkpoint(base).config, values), base=base) == {BIAS}


def test_the_base_before_the_merge_is_called_so(nvidia, base, tmp_path):
    attention = [
        linear.weight
        for linear in NEMOTRON_H.linears(Checkpoint(base).config)
        if linear.part in ("mixer.q_proj", "mixer.v_proj")
    ]

    def remedies(folder, *changed):
        values = tensors(base)
        for name in changed:
            values[name] = torch.nextafter(values[name], torch.full_like(values[name], 1e4))
        found = audit(nvidia, written(folder, Checkpoint(base).config, values)).findings
        assert {finding.subject for finding in found} == set(changed)
        return {"before the merge" in finding.remedy for finding in found}

    assert remedies(tmp_path / "before", *attention) == {True}
    assert remedies(tmp_path / "another", *attention, BIAS) == {False}
    assert remedies(tmp_path / "one", attention[0]) == {False}  # a bit of one tensor


def test_a_base_that_is_another_model_or_rounded_or_torn(nvidia, base, tmp_path):
    other = small.base(tmp_path / "other", "ME")
    assert "backbone.layers.3.mixer.q_proj.weight" in subjects(nvidia, base=other)
    rounded = written(
        tmp_path / "rounded",
        Checkpoint(base).config,
        {n: v.bfloat16() if n == BIAS else v for n, v in tensors(base).items()},
    )
    assert subjects(nvidia, base=rounded) == {BIAS}
    (other / INDEX).write_text("{")
    assert subjects(nvidia, base=other) == {"--base other"}


# --- files --------------------------------------------------------------------------------------------------


def test_files_that_are_torn_foreign_or_missing_are_all_named(nvidia, tmp_path):
    folder = shutil.copytree(nvidia, tmp_path / "made")
    torn, foreign, gone = sorted(folder.glob("*.safetensors"))[:3]
    torn.write_bytes(torn.read_bytes()[:-10])
    foreign.write_bytes(b"<!DOCTYPE html><html>not found</html>")
    gone.unlink()
    found = audit(folder)
    assert found.facts == {} and [f.subject for f in found.findings] == [torn.name, foreign.name, gone.name]
    assert "truncated" in found.findings[0].found and "no such file" in found.findings[2].found


def test_a_header_that_lies_about_a_shape_is_named(nvidia, tmp_path):
    folder = shutil.copytree(nvidia, tmp_path / "made")
    file = Checkpoint(folder).entries[EMBEDDINGS].file
    file.write_bytes(file.read_bytes().replace(b'"shape":[512,128]', b'"shape":[512,129]', 1))
    assert EMBEDDINGS in audit(folder).findings[0].found


def test_an_index_that_names_what_is_in_no_file_and_the_reverse(nvidia, tmp_path):
    def change(index):
        index["weight_map"]["backbone.layers.8.norm.weight"] = index["weight_map"].pop(BIAS)

    assert subjects(edited(nvidia, tmp_path / "made", change, INDEX)) == {
        "backbone.layers.8.norm.weight",
        BIAS,
    }


def test_a_safetensors_file_that_no_index_names(nvidia, tmp_path):
    folder = shutil.copytree(nvidia, tmp_path / "made")
    shutil.copyfile(next(folder.glob("*.safetensors")), folder / "adapter_model.safetensors")
    assert subjects(folder) == {"adapter_model.safetensors"}
    (folder / "config.json").write_text("{")
    assert subjects(folder) == {"adapter_model.safetensors", "made"}


def test_a_scale_that_is_larger_than_any_memory_is_named_and_not_read(nvidia, tmp_path):
    folder = shutil.copytree(nvidia, tmp_path / "made")
    name, size = f"{EXPERT}.gate_proj.weight_scale", 2**40
    head = json.dumps({name: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (folder / "more.safetensors").open("wb") as opened:  # sparse: it takes no space
        opened.write(struct.pack("<Q", len(head)) + head)
        opened.truncate(8 + len(head) + size)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = "more.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert subjects(folder) == {name}


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden_size": 128}', '{"hybrid_override_pattern": "M-"}'])
def test_a_config_that_describes_no_nemotron_h(nvidia, tmp_path, text):
    folder = shutil.copytree(nvidia, tmp_path / "made")
    (folder / "config.json").write_text(text)
    assert audit(folder).facts == {} and subjects(folder) == {"made"}


# --- what a vLLM can load -----------------------------------------------------------------------------------


@pytest.mark.trap("in-proj-on-old-vllm")
def test_a_vllm_that_reads_a_quantised_in_proj_wrongly(nvidia, base, tmp_path):
    made = audit(nvidia, vllm="0.17.1")
    assert (
        made.serve is None
        and [f.subject for f in made.findings] == ["--vllm"]
        and "0.18" in made.findings[0].remedy
    )
    conservative = audit(quantised(base, tmp_path / "made", "conservative"), vllm="0.12.0")
    assert conservative.findings == [] and "VLLM_USE_FLASHINFER_MOE_FP4" in conservative.serve.env


def test_the_flags_follow_the_checkpoint_and_the_build(nvidia, base):
    assert audit(nvidia, vllm="0.31.0").serve.args[-4:] == [
        "--kv-cache-dtype",
        "fp8",
        "--moe-backend",
        "flashinfer_cutlass",
    ]
    assert "--enforce-eager" in audit(nvidia, vllm="0.32.0+cpu").serve.args
    assert "--moe-backend" not in audit(base, vllm="0.31.0").serve.args
    assert subjects(base, vllm="nightly") == {"--vllm"}


def test_as_a_program_it_prints_json_and_exits_with_1_on_a_fault(nvidia, base):
    def ran(*words):
        done = subprocess.run(
            [sys.executable, "-m", "model.checkpoint_audit", *map(str, words)],
            cwd=REPO,
            capture_output=True,
            text=True,
        )
        return done.returncode, json.loads(done.stdout)

    code, whole = ran(nvidia, "--base", base, "--vllm", "0.31.0")
    assert (
        code == 0
        and whole["findings"] == []
        and whole["facts"]["layout"] == "nvidia"
        and "--moe-backend" in whole["serve"]["args"]
    )
    code, refused = ran(nvidia, "--vllm", "0.12.0")
    assert (
        code == 1
        and refused["findings"][0].keys() == {"subject", "found", "expected", "remedy"}
        and refused["serve"] is None
    )
