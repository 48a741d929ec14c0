"""vLLM's own reference for reading NVFP4 weights, the one that its emulation multiplies with, finds in our
tensors what `unpack` does.
"""

import pytest
import torch

from model.weights import nvfp4


@pytest.mark.parametrize("search", nvfp4.SEARCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_vllm_decodes_the_bits_that_unpack_does(search, dtype):
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    torch.manual_seed(0)
    stack = torch.randn(3, 64, 256) * torch.logspace(-7, 1, 256)  # from the smallest scales to the largest
    stack[1, 3, 16:48], stack[2, ::7] = 0, -0.0
    packed = nvfp4.pack(stack.to(dtype), search)
    ours = nvfp4.unpack(packed)
    theirs = dequantize_to_dtype(
        packed.weight, packed.weight_scale, packed.weight_scale_2, torch.float32, swizzle=False
    )
    assert torch.equal(theirs.view(torch.int32), ours.view(torch.int32))
    one = dequantize_to_dtype(
        packed.weight[0], packed.weight_scale[0], packed.weight_scale_2[0], torch.bfloat16, swizzle=False
    )
    assert torch.equal(one, ours[0].bfloat16()) and one.any()
