"""The parameters of stage evaluate, made by `make parameters` from stage.toml: change that file instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Parameters:
    # longest context in tokens
    max_model_len: int
    # longest answer in tokens; a longer one counts as verbosity
    max_tokens: int
    # questions asked at the same time
    concurrency: int
    # share of the GPU's memory that each server takes while it is asked; the BF16 model alone is 63 GB
    memory_share: float
    # the server's KV cache; auto: FP8 where the checkpoint asks for it and a GPU serves it, else the model's
    # own dtype
    kv_cache: Literal["auto", "bfloat16", "fp8"]
    # what every column has to reach before an image is built, such as {tuned: 0.9}; none builds an image
    # without a check
    gate: dict[str, Any] | Literal["none"]
    # the checks of behaviour that every answer has to pass, such as {follow_up: off, verbosity: {max_words:
    # 80}}; one that is left out is as a voice assistant needs it
    checks: dict[str, Any]
    # the adapter is a control that should change no answer (train's steps: 0); its gate never passes. false
    # refuses an adapter that changes no answer
    control: bool
