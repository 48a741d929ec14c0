"""Trap 23: vLLM's own matching agrees with our layout on every module of the real model."""

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs the vllm environment")

from nemotron import layout, names  # noqa: E402

NANO = json.loads((Path(__file__).parents[1] / "nemotron" / "golden" / "nano-config.json").read_text())


@pytest.mark.parametrize("chosen", layout.LAYOUTS)
def test_trap_23_vllm_excludes_what_the_layout_leaves_in_bf16(chosen):
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    config = ModelOptNvFp4Config.from_config(layout.hf_quant_config(NANO, chosen, "FP8", "0"))
    excluded, quantised = layout.excluded(NANO, chosen), layout.quantised(NANO, chosen)
    assert not [m for m in excluded if not config.is_layer_excluded(m)]
    assert not [m for m in quantised if config.is_layer_excluded(m)]
    assert set(excluded).isdisjoint(quantised) and len(excluded) + len(quantised) < len(names.tensors(NANO))
