"""The parameters of stage quantize, made by `make parameters` from stage.toml: change that file instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Parameters:
    # which linears are quantised (model/families/nemotron_h/layout.py)
    layout: Literal["nvidia", "conservative", "experts"]
    # w4a4 quantises activations too, with calibrated scales; w4a16 weights alone: no calibration, served by
    # Marlin (vLLM 0.22 and newer)
    format: Literal["w4a4", "w4a16"]
    # how a group's scale is chosen: nearest maps its largest weight to 6, as ModelOpt and rounded training
    # steps do; mse takes the scale with the least error
    scales: Literal["nearest", "mse"]
    # which code calibrates: own holds one layer at a time and keeps one maximum per expert; modelopt holds
    # the whole model, and its experts share one maximum
    engine: Literal["own", "modelopt"]
    # the KV cache that the checkpoint asks its server for; none: the model's own dtype (BF16: 6 KB a token of
    # the real model)
    kv_cache: Literal["none", "FP8"]
    # training conversations that calibrate the activation scales
    calibration_rows: int
    # most tokens used of each calibration conversation
    calibration_tokens: int
    # held-out tokens on which the quantised model's loss, KL and error by layer are compared with the
    # source's; 0 leaves the comparison out
    fidelity_tokens: int
