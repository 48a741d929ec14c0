"""What vLLM reads of a checkpoint's settings: its own matching agrees with our layout on every
module of the real model; and weight-only.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from model import layouts
from model.families.nemotron_h import names
from model.families.nemotron_h.layout import LAYOUTS
from model.weights import quant_config

NANO = json.loads((Path(__file__).parents[1] / "model" / "golden" / "nano-config.json").read_text())


@pytest.mark.parametrize("chosen", LAYOUTS)
@pytest.mark.trap("corrupted-names")
def test_vllm_excludes_what_the_layout_leaves_in_bf16(chosen):
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    config = ModelOptNvFp4Config.from_config(layouts.hf_quant_config(NANO, chosen, "FP8", "0"))
    excluded, quantised = layouts.excluded(NANO, chosen), layouts.quantised(NANO, chosen)
    assert not [m for m in excluded if not config.is_layer_excluded(m)]
    assert not [m for m in quantised if config.is_layer_excluded(m)]
    assert set(excluded).isdisjoint(quantised) and len(excluded) + len(quantised) < len(names.tensors(NANO))


@pytest.mark.trap("corrupted-names")
@pytest.mark.parametrize(
    "exclude",
    [
        "lm_head",
        "backbone.layers.1",
        "backbone.layers.4.mixer*",
        "backbone.layers.*.mixer.conv1d",
        "*.q_proj",
        "in_proj",
        "lm_head.\0x",
    ],
)
def test_the_audit_matches_an_exclude_as_vllm_does(exclude):
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
    from vllm.model_executor.models.utils import WeightsMapper

    settings = layouts.hf_quant_config(NANO, "nvidia", "FP8", "0")
    settings["quantization"]["exclude_modules"] = [exclude]
    config = ModelOptNvFp4Config.from_config(settings)
    config.apply_vllm_mapper(WeightsMapper())
    modules = [
        name.removesuffix(".weight")
        for name in names.tensors(NANO)
        if name.endswith(("_proj.weight", "conv1d.weight", "lm_head.weight")) and ".experts." not in name
    ]
    assert [m for m in modules if quant_config.covers(exclude, m)] == [
        m for m in modules if config.is_layer_excluded(m)
    ]


def test_vllm_knows_the_algorithms_of_the_audit():
    from vllm.model_executor.layers.quantization.modelopt import QUANT_ALGOS

    assert quant_config.ALGORITHMS.keys() <= set(QUANT_ALGOS)


@pytest.mark.parametrize("kv_cache", ["FP8", None])
def test_vllm_reads_in_config_json_what_hf_quant_config_says(kv_cache):
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
    from vllm.utils.torch_utils import get_kv_cache_quant_algo_string

    nested = layouts.hf_quant_config(NANO, "nvidia", kv_cache, "0", weight_only=True)
    inside = quant_config.for_config_json(nested)
    assert vars(ModelOptNvFp4Config.from_config(inside)) == vars(ModelOptNvFp4Config.from_config(nested))
    assert (
        get_kv_cache_quant_algo_string(inside)
        == get_kv_cache_quant_algo_string({**nested, "quant_method": "modelopt"})
        == ("fp8_e4m3" if kv_cache else None)
    )
    assert ModelOptNvFp4Config.override_quantization_method(inside, None) == "modelopt_fp4"


def test_vllm_takes_weights_alone_from_config_json_only():
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    def taken(settings):
        return ModelArchConfigConvertorBase._normalize_quantization_config(
            None, SimpleNamespace(quantization_config=settings)
        )

    nested = layouts.hf_quant_config(NANO, "nvidia", "FP8", "0", weight_only=True)
    assert taken(quant_config.for_config_json(nested))["quant_method"] == "modelopt"
    with pytest.raises(ValueError, match="Unknown ModelOpt quant algo: W4A16_NVFP4"):
        taken(nested)  # once this passes, W4A16 can do without config.json: see model/weights/quant_config.py
