"""The bench of packing: chunks and in-place operations give the bits of the format's plain definition,
whatever the weights.
"""

import pytest
import torch

from bench import pack
from model.weights import nvfp4


def inputs() -> dict[str, torch.Tensor]:
    """Stacks of three matrices (40, 256), float64."""
    normal = torch.randn(3, 40, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    eighths = torch.randint(-56, 57, (3, 40, 256), generator=torch.Generator().manual_seed(2)).double() / 8
    eighths[..., ::16] = 6
    zeros = normal.clone()
    zeros[0, 3, 16:48], zeros[1], zeros[2, 5], zeros[2, 6, ::2] = 0, 0, -0.0, -0.0
    broken = normal.clone()
    broken[0, 0, 0], broken[1, 2, 3] = torch.nan, -torch.inf
    return {
        "normal": normal * 0.02,
        "ties": eighths,
        "ties under the largest scale": eighths * 448,
        "zeros and negative zeros": zeros,
        "scales from the smallest to the largest": normal * torch.logspace(-8, 3, 256, dtype=torch.float64),
        "second scales that float32 can hold, barely": normal * 1e-38,
        "and cannot": normal * 1e-43,
        "negative weights that vanish": normal * torch.logspace(-46, 20, 256, dtype=torch.float64),
        "NaN and infinity": broken,
    }


@pytest.mark.parametrize("kind", inputs())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk", [nvfp4.CHUNK, 112])
def test_chunks_have_the_bits_of_whole_tensors(kind, dtype, chunk, monkeypatch):
    monkeypatch.setattr(nvfp4, "CHUNK", chunk)
    stack = inputs()[kind].to(dtype)
    for weight in (
        stack,
        stack[0],
        stack.unflatten(1, (2, 20)),
        stack.transpose(1, 2)[:, :, :32],
        stack[:, ::2, 16:240],
    ):
        before = weight.clone()
        packed, plain = nvfp4.pack(weight), pack.plain_pack(weight)
        for part in ("weight", "weight_scale", "weight_scale_2"):
            assert pack.same(getattr(packed, part), getattr(plain, part)), part
        assert pack.same(nvfp4.unpack(packed), pack.plain_unpack(plain))
        assert pack.same(weight, before)


def test_every_byte_under_every_scale_unpacks_as_the_definition_says():
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    packed = nvfp4.Packed(
        torch.arange(256, dtype=torch.uint8).view(32, 8).repeat(1, 127),
        scales.repeat(32, 1),
        torch.tensor(3e-5),
    )
    assert pack.same(nvfp4.unpack(packed), pack.plain_unpack(packed))


def test_it_runs_and_its_table_says_that_the_bits_are_equal(capsys):
    threads = torch.get_num_threads()
    pack.main(2, 32, 64)
    said = capsys.readouterr().out
    assert "equal to plain" in said and "pack, mse" in said and torch.get_num_threads() == threads
