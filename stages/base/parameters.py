"""The parameters of stage base, made by `make parameters` from stage.toml: change that file instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Parameters:
    # Where the base comes from
    source: Literal["hub", "folder", "tiny"]
    # hub: repository, such as nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16
    repository: str
    # hub: the commit, 40 hex digits; a branch or tag can move and is refused
    commit: str
    # hub, folder: whether vLLM may run Python code of this checkpoint (--trust-remote-code); only a vLLM
    # before 0.17.1 needs it, for its parser of reasoning, and is refused otherwise
    trust: bool
    # tiny: the layers, a letter each: M Mamba-2, * attention, E experts
    pattern: str
    # tiny: hidden size, a multiple of 128
    hidden: int
    # tiny: routed experts per layer, two of which see each token
    experts: int
    # tiny: the largest vocabulary the tokenizer may have
    vocabulary: int
    # tiny: the first part of the teaching sees only lessons of at most so many tokens
    short_tokens: int
    # tiny: steps of the first part
    short_steps: int
    # tiny: steps of the second part, on all lessons
    steps: int
    # tiny: tokens a batch, padding included; half of it in the first part
    batch_tokens: int
    # tiny: peak learning rate; twice as high in the first part
    learning_rate: float
