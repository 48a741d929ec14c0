"""The parameters of stage package, made by `make parameters` from stage.toml: change that file instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Parameters:
    # nvfp4: the quantised checkpoint; merged: the BF16 one; tuned: the BF16 base and the adapter, which vLLM
    # adds at run time (targets: attention)
    serves: Literal["nvfp4", "merged", "tuned"]
    # insert: the server gives a chat without a system message the production prompt; none: it does not
    default_prompt: Literal["insert", "none"]
    # the model's name for clients; by default the recipe's name
    served_name: str
    # the image annie/SERVICE and the service that compose starts, in lower case: letters and digits, with
    # single dots or dashes between them; by default vllm- and the recipe's name
    service: str
    # the assistant's name, in the model card and in build.py chat; by default the recipe's name
    assistant: str
    # longest context in tokens that is served
    max_model_len: int
    # requests answered at the same time
    max_num_seqs: int
    # requests that may wait; a further one is refused with 429
    max_waiting: int
    # answers that one request may ask for (`n`, or a list of prompts)
    max_choices: int
    # share of the GPU's memory that vLLM takes; the BF16 model alone is 63 GB, so serve it with about 0.7 of
    # a DGX Spark
    memory_share: float
    # the server's KV cache; auto: FP8 where the checkpoint asks for it and a GPU serves it, else the model's
    # own dtype
    kv_cache: Literal["auto", "bfloat16", "fp8"]
