"""The 4-bit format, bit for bit ModelOpt's."""

import pytest

torch = pytest.importorskip("torch", reason="needs the train environment")
pytest.importorskip("modelopt", reason="needs the train environment")

from nemotron import nvfp4  # noqa: E402


def reference(weight):
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    return NVFP4QTensor.quantize(weight, 16)


@pytest.mark.parametrize("kind", ["normal", "outlier", "zero_groups", "ties", "zero"])
def test_packing_equals_modelopt_bit_for_bit(kind):
    torch.manual_seed(3)
    weight = (torch.randn(64, 128) * 0.02).bfloat16()
    if kind == "outlier":
        weight[0, 0] = 40
    elif kind == "zero_groups":
        weight[3, 16:48] = 0
    elif kind == "ties":
        weight = (torch.randint(-24, 25, (64, 128)) / 4).bfloat16()
    elif kind == "zero":
        weight = torch.zeros(64, 128).bfloat16()
    packed = nvfp4.pack(weight)
    if kind == "zero":
        assert not nvfp4.unpack(packed).any()
        return
    theirs, scale, second = reference(weight)
    assert torch.equal(packed.weight, theirs._quantized_data)
    assert torch.equal(packed.weight_scale.view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(packed.weight_scale_2, second.reshape(()))


def test_every_code_survives_a_round_trip():
    row = torch.tensor([*nvfp4.GRID, *(-v for v in nvfp4.GRID)])
    packed = nvfp4.pack(row.repeat(2, 1) * 448)
    assert torch.equal(nvfp4.unpack(packed), row.repeat(2, 1) * 448)


def test_trap_22_a_small_delta_drowns_in_fp4():
    torch.manual_seed(0)
    weight = torch.randn(512, 1024) * 0.02
    x = torch.randn(256, 1024)
    delta = torch.randn(512, 8) @ torch.randn(8, 1024)

    def kept(share):
        small = delta * (share * weight.norm() / delta.norm())
        after = nvfp4.unpack(nvfp4.pack(weight + small)) - nvfp4.unpack(nvfp4.pack(weight))
        return torch.nn.functional.cosine_similarity((x @ small.T).flatten(), (x @ after.T).flatten(), 0).item()

    error = (nvfp4.unpack(nvfp4.pack(weight)) - weight).norm() / weight.norm()
    assert 0.08 < error < 0.11
    few, more, most = kept(0.002), kept(0.01), kept(0.3)
    print(f"cosine of the delta's output: 0.2 % {few:.2f}, 1 % {more:.2f}, 30 % {most:.2f}")
    assert few < more < 0.5 < 0.9 < most


def test_an_odd_input_dimension_is_refused():
    with pytest.raises(ValueError, match="multiple of 16"):
        nvfp4.pack(torch.ones(4, 24))
