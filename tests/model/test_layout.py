"""NVIDIA's own quantisation layout, reproduced from the config alone."""

import json
import math
from pathlib import Path

import pytest

from model import layouts
from model.weights.checkpoint import DTYPES

GOLDEN = Path(__file__).parent / "golden"
NANO = json.loads((GOLDEN / "nano-config.json").read_text())
PUBLISHED = json.loads((GOLDEN / "nano-hf_quant_config.json").read_text())


def test_the_excludes_are_the_published_ones():
    published = PUBLISHED["quantization"]["exclude_modules"]
    assert len(published) == 60
    assert sorted(layouts.excluded(NANO, "nvidia")) == sorted(published)


def test_counts_of_linears_and_tensors_are_the_published_ones():
    assert len(layouts.quantised(NANO, "nvidia")) == 5968
    assert len(layouts.quantised(NANO, "conservative")) == 5934
    assert len(layouts.tensors(NANO, "nvidia")) == 24_147


def test_quant_config_has_the_published_form():
    made = layouts.hf_quant_config(NANO, "nvidia", "FP8", "0")
    assert made["quantization"].keys() <= PUBLISHED["quantization"].keys() | {"exclude_modules"}
    assert made["quantization"]["quant_algo"] == PUBLISHED["quantization"]["quant_algo"]


def test_scales_of_a_matrix_are_scalars():
    found = layouts.tensors(NANO, "nvidia")
    name = layouts.quantised(NANO, "nvidia")[0]
    assert found[f"{name}.weight_scale_2"].shape == found[f"{name}.input_scale"].shape == ()


def test_bytes_of_the_whole_checkpoint():
    size = sum(
        math.prod(s.shape) * DTYPES[s.dtype].itemsize for s in layouts.tensors(NANO, "nvidia").values()
    )
    # NVIDIA's file holds A_log and D in BF16 and the router weights in F32; ours keeps the source's dtypes.
    ours_to_theirs = 23 * (128 * 2688 * 2 - 2 * 64 * 2)
    assert size + ours_to_theirs == 19_339_781_632


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="known are"):
        layouts.quantised(NANO, "everything")
