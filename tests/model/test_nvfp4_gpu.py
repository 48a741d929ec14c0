"""The 4-bit format has the same bits whatever packs it; in a file of its own, since ModelOpt is not on
every machine with a GPU.
"""

import pytest
import torch

from model.weights import nvfp4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_packs_to_the_bits_of_a_cpu(search, dtype):
    torch.manual_seed(1)
    weights = (torch.randn(16, 256, 512) * torch.logspace(-3, 1, 16)[:, None, None]).to(dtype)
    weights[3, 5, 16:48] = 0
    here, there = nvfp4.pack(weights, search), nvfp4.pack(weights.cuda(), search)
    for part, value in vars(here).items():
        assert torch.equal(value.view(torch.uint8), getattr(there, part).cpu().view(torch.uint8)), part
    assert torch.equal(nvfp4.unpack(here), nvfp4.unpack(there).cpu())
