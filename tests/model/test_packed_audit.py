"""The audit of packed weights against what they were made from: whole ones pass, flipped bits are seen."""

import json
import os
import random
import shutil
from itertools import pairwise

import pytest
import small
import torch
from packed import quantised, tensors, written

from model import layouts, packed_audit
from model.audit import digest as digest_of
from model.checkpoint_audit import audit
from model.weights import nvfp4
from model.weights.checkpoint import Checkpoint

EXPERT = "backbone.layers.1.mixer.experts.0.up_proj"
FLIPS = 25


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small.base(tmp_path_factory.mktemp("source") / "base")


def exported(base, folder, search, recorded=True, change=lambda values: None):
    """`base` in NVFP4, with the record that stage quantize leaves of it."""
    quantised(base, folder, "nvidia", change, search=search)
    if recorded:
        checkpoint = Checkpoint(folder)
        names = [name for name in checkpoint.entries if name.endswith(".input_scale")]
        digest = digest_of({name: checkpoint.tensor(name) for name in names})
        record = {"scales": search, "calibration": {"input_scales": digest}}
        (folder / packed_audit.RECORD).write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module", params=nvfp4.SEARCHES)
def made(request, base, tmp_path_factory):
    return exported(base, tmp_path_factory.mktemp(request.param) / "made", request.param)


@pytest.fixture(scope="module")
def stranger(base, tmp_path_factory):
    return exported(base, tmp_path_factory.mktemp("stranger") / "made", "mse", recorded=False)


def flips(folder, part, count):
    """Seeded single flips in the tensors of `part`: the tensor, the byte in it, and the bit."""
    checkpoint, chosen = Checkpoint(folder), random.Random(part)
    modules = layouts.quantised(checkpoint.config, "nvidia")
    for _ in range(count):
        name = f"{chosen.choice(modules)}.{part}"
        yield name, chosen.randrange(checkpoint.entries[name].bytes), chosen.randrange(8)


def flip(folder, name, byte, bit):
    """Flips a bit on the disk, and back when it is called again."""
    entry = Checkpoint(folder).entries[name]
    with entry.file.open("r+b") as opened:
        opened.seek(entry.start + byte)
        old = opened.read(1)[0]
        opened.seek(entry.start + byte)
        opened.write(bytes([old ^ 1 << bit]))


def seen(folder, base, part, deep, count=FLIPS):
    """The flips, and for each the findings of an audit."""
    for where in flips(folder, part, count):
        flip(folder, *where)
        yield where, audit(folder, base, deep=deep).findings
        flip(folder, *where)


# --- what is whole ------------------------------------------------------------------------------------------


def test_what_stage_quantize_wrote_passes(made, base):
    size = sum(
        entry.bytes
        for name, entry in Checkpoint(made).entries.items()
        if entry.dtype in ("U8", "F8_E4M3") or name.endswith("weight_scale_2")
    )
    told = []
    deep = audit(made, base, deep=True, on_progress=lambda *progress: told.append(progress))
    assert deep.findings == []
    assert deep.facts["compared"] == {"rule": made.parent.name[:-1], "bytes": size, "of": size}
    assert told[-1] == (size, size) and [done for done, _ in told] == sorted({done for done, _ in told})
    sample = audit(made, base)
    assert sample.findings == [] and 0 < sample.facts["compared"]["bytes"] < size / 2
    assert audit(made).facts["compared"] is None and audit(base, base).facts["compared"] is None


def test_what_a_stranger_wrote_passes_whatever_the_rule_was(stranger, base, tmp_path):
    for folder in (stranger, exported(base, tmp_path / "made", "nearest", recorded=False)):
        made = audit(folder, base, deep=True)
        assert made.findings == [] and made.facts["compared"]["rule"] == "rounding"


def test_a_stranger_s_experts_may_share_one_weight_scale_2(base, tmp_path):
    """And divide by it in BF16."""

    def shared(values):
        names = [name for name in values if name.endswith("weight_scale_2")]
        largest = max(values[name] for name in names)
        for module in (name.removesuffix(".weight_scale_2") for name in names):
            weight = Checkpoint(base).tensor(f"{module}.weight")
            groups = weight.reshape(-1, nvfp4.GROUP)
            scale = nvfp4.block_scale(groups.float().abs().amax(-1), largest, nvfp4.FP4_MAX)
            codes = nvfp4.encode((groups / (scale.float() * largest).bfloat16()[:, None]).float())
            values |= {
                f"{module}.weight": (codes[:, ::2] | codes[:, 1::2] << 4).reshape(len(weight), -1),
                f"{module}.weight_scale": scale.reshape(len(weight), -1),
                f"{module}.weight_scale_2": largest,
            }

    folder = exported(base, tmp_path / "made", "nearest", recorded=False, change=shared)
    assert audit(folder, base, deep=True).findings == []


def test_weights_of_every_size_are_within_their_own_rounding():
    """From scales that E4M3 holds with no digit to the largest, groups of zeros too."""
    torch.manual_seed(0)
    weight = (torch.randn(64, 512) * torch.logspace(-9, 0, 64)[:, None]).bfloat16()
    weight[3, 16:48] = 0
    for search in nvfp4.SEARCHES:
        rows = packed_audit.Rows("linear", weight, nvfp4.pack(weight, search))
        assert list(packed_audit._beyond_rounding(rows)) == []
        assert list(packed_audit._requantised(rows, search)) == []


def test_a_scale_of_mse_may_be_another_that_is_as_good(base, tmp_path):
    """Which of two is chosen depends on the order of a sum, and on a GPU that is another."""
    values = tensors(base)
    weight = values[f"{EXPERT}.weight"]
    second = nvfp4.pack(weight).weight_scale_2
    weight[5, 16:32] = 3 * 64 * second  # exactly 3 times a scale of 64, and 1.5 times one of 128
    source = written(tmp_path / "base", Checkpoint(base).config, values)

    def other_scale(packed, scale, code):
        packed[f"{EXPERT}.weight_scale"][5, 1] = scale
        packed[f"{EXPERT}.weight"][5, 8:16] = code

    for code, wrong in (
        (0x55, set()),
        (0x54, {f"{EXPERT}.weight_scale"}),
        (0x33, {f"{EXPERT}.weight_scale"}),
    ):
        folder = exported(
            source, tmp_path / f"{code}", "mse", change=lambda v, code=code: other_scale(v, 64.0, code)
        )
        found = {f.subject for f in audit(folder, source, deep=True).findings}
        assert found == wrong, code


# --- flipped bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", packed_audit.PARTS)
def test_a_deep_audit_sees_every_flipped_bit(made, base, part):
    for (name, _, _), findings in seen(made, base, part, deep=True):
        assert {f.subject for f in findings} == {name}
    assert audit(made, base, deep=True).findings == []


def test_a_sample_sees_every_flipped_bit_of_a_weight_scale_2(made, base):
    for (name, _, _), findings in seen(made, base, "weight_scale_2", deep=False, count=10):
        assert {f.subject for f in findings} == {name}


def test_a_sample_sees_that_the_largest_scale_is_gone(made, base):
    """Without it the sample does not know the largest weight; the linear is then read in full."""
    scale = Checkpoint(made).tensor(f"{EXPERT}.weight_scale").view(torch.uint8).flatten()
    largest = (scale >= packed_audit.LARGEST[made.parent.name[:-1]]).nonzero().flatten().tolist()
    for byte in largest:
        flip(made, f"{EXPERT}.weight_scale", byte, 5)
    found = audit(made, base).findings
    for byte in largest:
        flip(made, f"{EXPERT}.weight_scale", byte, 5)
    assert [f.subject for f in found] == [f"{EXPERT}.weight_scale"]
    assert f"in {len(largest)} of {len(scale):,} groups" in found[0].found and "changed" in found[0].remedy


@pytest.mark.parametrize("part", packed_audit.PARTS)
def test_of_a_stranger_every_flip_beyond_rounding_is_seen(stranger, base, part):
    whole = Checkpoint(stranger)
    for (name, _, _), findings in seen(stranger, base, part, deep=True, count=10):
        module = name.removesuffix(f".{part}")
        weight = Checkpoint(base).tensor(f"{module}.weight").float()
        step, value = nearest(whole, module, weight)
        beyond = (value - weight).abs() > step / 2 + 2.0**-6 * weight.abs()
        if beyond.any():
            assert findings and name.startswith(findings[0].subject.removesuffix(".weight")), name
        if findings:
            assert not torch.equal(value, nvfp4.unpack(nvfp4.pack(weight, "mse")))


def nearest(checkpoint, module, weight):
    """The distance of the numbers that a code may stand for, around every weight, and what it stands for."""
    packed = nvfp4.Packed(*(checkpoint.tensor(f"{module}.{part}") for part in packed_audit.PARTS))
    value = nvfp4.unpack(packed)
    scale = packed.weight_scale.float().repeat_interleave(nvfp4.GROUP, -1) * packed.weight_scale_2
    size = (weight / scale).abs()
    return torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)) * scale, value


def test_every_flipped_bit_of_an_input_scale_is_seen_without_a_base(made):
    for (name, _, _), findings in seen(made, None, "input_scale", deep=False):
        assert [f.subject for f in findings] in (["input_scale"], [name])  # a negative one is named


def test_a_negative_input_scale_is_one_finding(made):
    sign = f"{EXPERT}.input_scale", 3, 7
    flip(made, *sign)
    found = audit(made).findings
    flip(made, *sign)
    assert [f.subject for f in found] == [f"{EXPERT}.input_scale"]


# Weights divided by their scale, the code for them (8 and above: negative), and whether that fits.
CODES = [
    (0.2, 0, True),
    (-0.2, 0, True),
    (0.2, 8, True),
    (0.3, 0, False),
    (0.3, 1, True),
    (-0.3, 1, False),
    (-0.3, 9, True),
    (2.4, 4, True),
    (2.6, 4, False),
    (4.9, 6, True),
    (4.9, 7, False),
    (5.1, 7, True),
    (7.4, 7, True),
    (12.0, 7, False),
    (-12.0, 15, False),
    (float("nan"), 0, False),
]


@pytest.mark.parametrize(("value", "code", "fits"), CODES)
def test_a_code_stands_for_the_values_that_round_to_it(value, code, fits):
    weight, codes = torch.zeros(2, 32), torch.zeros(2, 16, dtype=torch.uint8)
    weight[1, 21], codes[1, 10] = value * 64 * 0.25, code << 4
    scale, second = torch.full((2, 2), 64.0).to(torch.float8_e4m3fn), torch.tensor(0.25)
    rows = packed_audit.Rows("linear", weight, nvfp4.Packed(codes, scale, second))
    assert [f.found for f in packed_audit._beyond_rounding(rows)] == (
        [] if fits else ["weights beyond rounding of the source's, in 1 of 4 groups"]
    )


# --- other weights, and folders that are broken -------------------------------------------------------------


def test_weights_of_another_model_are_called_so(made, stranger, base, tmp_path):
    values = tensors(base)
    torch.manual_seed(1)
    for name in layouts.quantised(Checkpoint(base).config, "nvidia"):
        weight = values[f"{name}.weight"]
        values[f"{name}.weight"] = weight[torch.randperm(len(weight))]
    other = written(tmp_path / "other", Checkpoint(base).config, values)
    modules = layouts.quantised(Checkpoint(base).config, "nvidia")
    for folder in (made, stranger):
        for deep in (False, True):
            found = audit(folder, other, deep=deep).findings
            assert sorted(f.subject for f in found) == sorted(f"{module}.weight" for module in modules)
            assert all("made of other weights" in f.remedy for f in found)


def test_a_source_that_is_quantised_or_lacks_a_linear(made, base, tmp_path):
    (found, *_) = audit(made, made).findings
    assert found.found.startswith("U8") and "quantised itself" in found.remedy
    values = tensors(base)
    values[f"{EXPERT}.weight"] = values[f"{EXPERT}.weight"].to(torch.float8_e5m2)
    found = audit(made, written(tmp_path / "eight", Checkpoint(base).config, values), deep=True).findings
    assert [f.found for f in found] == ["F8_E5M2 (64, 128) in the source"]
    del values[f"{EXPERT}.weight"]
    found = audit(made, written(tmp_path / "less", Checkpoint(base).config, values), deep=True).findings
    assert [(f.subject, f.found) for f in found] == [(f"{EXPERT}.weight", "no such tensor in the source")]


RECORDS = {
    "torn": (lambda file: file.write_text("{"), "cannot be read as JSON"),
    "a list": (lambda file: file.write_text("[]"), "not an object"),
    "another rule": (lambda file: file.write_text('{"scales": "awq"}'), "scales 'awq' and"),
    "no word": (lambda file: file.write_text('{"scales": ["mse"]}'), "scales ['mse'] and"),
    "no calibration": (lambda file: file.write_text('{"calibration": []}'), "in audit.json"),
    "no digest": (lambda file: file.write_text('{"calibration": {"input_scales": 7}}'), "input_scales 7 in"),
    "a FIFO": (lambda file: os.mkfifo(file), "is a FIFO"),
    "a link": (lambda file: file.symlink_to("/etc/passwd"), "leads out of the folder"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_broken_record_is_named_and_the_weights_are_compared_by_rounding(stranger, base, tmp_path, kind):
    folder, (write, said) = shutil.copytree(stranger, tmp_path / "made"), RECORDS[kind]
    write(folder / packed_audit.RECORD)
    result = audit(folder, base)
    (finding,) = result.findings
    assert finding.subject == packed_audit.RECORD and said in finding.found and finding.remedy
    assert result.facts["compared"]["rule"] == "rounding"


def test_a_file_that_cannot_be_read_any_more_is_named(made, base, tmp_path):
    folder = shutil.copytree(made, tmp_path / "made")
    checkpoint, source = Checkpoint(folder), Checkpoint(base)
    file = checkpoint.entries[f"{EXPERT}.weight"].file
    file.unlink()
    findings, _ = packed_audit.compare(checkpoint, source, [EXPERT], "nearest", deep=True)
    assert [f.subject for f in findings] == [EXPERT]
    assert f"made/{file.name} cannot be read: No such file" in findings[0].found


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 127, 128, 129, 1856, 2688])
def test_a_sample_has_rows_of_every_quarter_and_is_the_same_each_time(count):
    chosen = packed_audit.sample(EXPERT, count)
    assert torch.equal(chosen, packed_audit.sample(EXPERT, count))
    assert int(chosen.sum()) == min(4, count) * max(1, count // 128)
    edges = [count * place // min(4, count) for place in range(min(4, count) + 1)]
    assert all(chosen[first:end].any() for first, end in pairwise(edges))
    if count > 16:
        assert not torch.equal(chosen, packed_audit.sample(EXPERT.replace(".0.", ".1."), count))
