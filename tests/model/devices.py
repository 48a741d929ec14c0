"""Where the tests of the fast path run: on the CPU always, on a GPU where there is one."""

import inspect

import pytest
import torch

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")),
]


def relative(found, wanted):
    """Norm of the difference over the norm of what was wanted, in float64."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def class_in_torch(monkeypatch):
    """Lets the native class's own mixer compute in plain torch: where mamba-ssm is there it calls it for
    tensors on the CPU too. A benchmark that ran before in this process may have done the same, for good.
    """
    from transformers.models.nemotron_h import modeling_nemotron_h as code

    for name in (
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "mamba2_chunk_scan",
        "mamba2_selective_state_update",
        "mamba2_split_conv1d_scan_combined",
    ):
        monkeypatch.setattr(code, name, inspect.unwrap(getattr(code, name)))
