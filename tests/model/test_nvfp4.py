"""The 4-bit format, bit for bit ModelOpt's."""

import ast
from pathlib import Path

import pytest
import torch

from model.weights import nvfp4


def reference(weight):
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    return NVFP4QTensor.quantize(weight, 16)


@pytest.mark.parametrize(
    "kind", ["normal", "outlier", "zero_groups", "negative_zeros", "ties", "subnormal_scales", "zero"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packing_equals_modelopt_bit_for_bit(kind, dtype):
    torch.manual_seed(3)
    weight = torch.randn(64, 128) * 0.02
    if kind == "outlier":
        weight[0, 0] = 40
    elif kind == "zero_groups":
        weight[3, 16:48] = 0
    elif kind == "negative_zeros":
        weight[3, 16:48] = weight[5, ::2] = -0.0
    elif kind == "ties":
        weight = torch.randint(-24, 25, (64, 128)) / 4
    elif kind == "subnormal_scales":
        weight *= torch.logspace(-6, 0, 128)
    elif kind == "zero":
        weight = torch.zeros(64, 128)
    weight = weight.to(dtype)
    packed = nvfp4.pack(weight)
    if kind == "zero":
        assert not nvfp4.unpack(packed).any()
        return
    if kind == "subnormal_scales":
        assert (packed.weight_scale.float() < 2**-6).any() and (
            packed.weight_scale.float() == nvfp4.SMALLEST
        ).any()
    theirs, scale, second = reference(weight)
    assert torch.equal(packed.weight, theirs._quantized_data)
    assert torch.equal(packed.weight_scale.view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(packed.weight_scale_2, second.reshape(()))


def test_every_code_survives_a_round_trip():
    row = torch.tensor([*nvfp4.GRID, *(-v for v in nvfp4.GRID)])
    packed = nvfp4.pack(row.repeat(2, 1) * 448)
    assert torch.equal(nvfp4.unpack(packed), row.repeat(2, 1) * 448)


@pytest.mark.trap("small-change-drowns-in-fp4")
def test_a_small_delta_drowns_in_fp4():
    torch.manual_seed(0)
    weight = torch.randn(512, 1024) * 0.02
    x = torch.randn(256, 1024)
    delta = torch.randn(512, 8) @ torch.randn(8, 1024)

    def kept(share):
        small = delta * (share * weight.norm() / delta.norm())
        after = nvfp4.unpack(nvfp4.pack(weight + small)) - nvfp4.unpack(nvfp4.pack(weight))
        return torch.nn.functional.cosine_similarity(
            (x @ small.T).flatten(), (x @ after.T).flatten(), 0
        ).item()

    error = (nvfp4.unpack(nvfp4.pack(weight)) - weight).norm() / weight.norm()
    assert 0.08 < error < 0.11
    few, more, most = kept(0.002), kept(0.01), kept(0.3)
    print(f"cosine of the delta's output: 0.2 % {few:.2f}, 1 % {more:.2f}, 30 % {most:.2f}")
    assert few < more < 0.5 < 0.9 < most


def test_an_odd_input_dimension_is_refused():
    with pytest.raises(ValueError, match="multiple of 16"):
        nvfp4.pack(torch.ones(4, 24))


def errors(weight, packed):
    """Squared error of each group, float64."""
    return (nvfp4.unpack(packed).double() - weight.double()).unflatten(-1, (-1, nvfp4.GROUP)).square().sum(-1)


def test_searched_scales_lower_the_error_of_normal_weights_by_a_quarter():
    torch.manual_seed(0)
    weight = (torch.randn(2, 256, 1024) * 0.02).bfloat16()
    nearest, mse = (errors(weight, nvfp4.pack(weight, search)).sum().item() for search in nvfp4.SEARCHES)
    print(f"squared error of mse: {mse / nearest:.3f} of that of nearest")
    assert mse < 0.75 * nearest


@pytest.mark.parametrize("kind", ["normal", "heavy_tails", "uniform", "wide", "ties", "zero"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_searched_scale_makes_no_group_worse(kind, dtype):
    torch.manual_seed(1)
    normal = torch.randn(2, 64, 256)
    weight = {
        "normal": normal,
        "heavy_tails": normal / torch.rand(2, 64, 256),
        "uniform": torch.rand(2, 64, 256) - 0.5,
        "wide": normal * torch.logspace(-8, 3, 256),
        "ties": torch.randint(-24, 25, (2, 64, 256)) / 4,
        "zero": normal * 0,
    }[kind].to(dtype)
    nearest, mse = nvfp4.pack(weight), nvfp4.pack(weight, "mse")
    assert torch.equal(mse.weight_scale_2, nearest.weight_scale_2)
    before, after = errors(weight, nearest), errors(weight, mse)
    assert (after <= before).all()
    other = mse.weight_scale.float() != nearest.weight_scale.float()
    assert (after < before)[other].all() and other.any() == (kind != "zero")  # a tie stays with nearest


def test_six_scales_are_nearly_as_good_as_all():
    """The least error of all 126 positive E4M3 scales, and codes found by looking for the nearest value of
    the grid.
    """
    torch.manual_seed(2)
    weight = torch.randn(64, 256)
    packed = nvfp4.pack(weight, "mse")
    scales = (
        torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        * packed.weight_scale_2.double()
    )
    size, grid = weight.double().abs().view(-1, nvfp4.GROUP), torch.tensor(nvfp4.GRID, dtype=torch.float64)
    best = torch.stack(
        [(size[..., None] - grid * scale).abs().amin(-1).square().sum(-1) for scale in scales]
    ).amin(0)
    assert best.sum() <= errors(weight, packed).sum() <= 1.01 * best.sum()


def test_weights_on_the_grid_keep_their_scales_under_the_search():
    torch.manual_seed(4)
    packed = nvfp4.pack(torch.randn(64, 256))
    weight = nvfp4.unpack(packed)
    again = nvfp4.pack(weight, "mse")
    assert torch.equal(again.weight_scale.float(), packed.weight_scale.float()) and torch.equal(
        nvfp4.unpack(again), weight
    )


def test_a_scale_beyond_e4m3_is_clamped():
    """Equal weights have their amax mapped to 6 by the largest scale there is; to map it to 4 there is
    none.
    """
    packed = nvfp4.pack(torch.ones(4, 32), "mse")
    assert (packed.weight_scale.float() == nvfp4.FP8_MAX).all() and torch.allclose(
        nvfp4.unpack(packed), torch.ones(4, 32)
    )


@pytest.mark.parametrize("search", nvfp4.SEARCHES)
def test_chunks_change_no_bit(search, monkeypatch):
    torch.manual_seed(5)
    weight = torch.randn(3, 40, 256)
    whole = nvfp4.pack(weight, search)
    monkeypatch.setattr(nvfp4, "CHUNK", 112)
    parts = nvfp4.pack(weight, search)
    assert torch.equal(parts.weight, whole.weight) and torch.equal(
        parts.weight_scale.float(), whole.weight_scale.float()
    )


def test_a_search_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="nearest, mse; found 'best'"):
        nvfp4.pack(torch.ones(4, 32), "best")


def test_the_constants_of_the_format_stand_in_one_place():
    repo = Path(__file__).resolve().parents[2]
    holders = {
        path.name
        for room in ("model", "stages")
        for path in (repo / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Constant) and node.value in (nvfp4.FP8_MAX, nvfp4.SMALLEST))
        or (isinstance(node, ast.BinOp) and ast.unparse(node) in ("inside // 16", "2.0 ** (-9)"))
    }
    assert holders == {"nvfp4.py"}
