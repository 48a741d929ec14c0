"""The parameters of stage merge, made by `make parameters` from stage.toml: change that file instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Parameters:
    # tokens of real conversations on which the merged model's forward pass is compared with the adapter's; 0
    # leaves the comparison out
    proof_tokens: int
    # precision of the models in that comparison; bfloat16 takes half the memory and adds its own rounding to
    # the error
    proof_precision: Literal["float32", "bfloat16"]
    # the adapter is a control, with B zero (train's steps: 0): refused unless every byte of the base comes
    # back; false refuses an adapter that changes nothing
    control: bool
