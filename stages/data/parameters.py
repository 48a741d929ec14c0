"""The parameters of stage data, made by `make parameters` from stage.toml: change that file instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Parameters:
    # longest conversation in tokens; a longer one is rejected, since cutting it would cut the answer
    max_tokens: int
    # share of the rows that is held out for the evaluation loss, spread over the categories; not used where
    # the data has its own test or validation split
    eval_share: float
    # what to do with rows whose system prompt is not the production prompt
    other_prompts: Literal["refuse", "allow"]
    # what to do with rows that have no system prompt; insert gives them the production prompt
    missing_prompt: Literal["refuse", "insert"]
    # what to do with rows that have no tools where the recipe names a tools file; insert gives them all of
    # its tools
    tools: Literal["refuse", "insert", "allow"]
    # what to do about calls of tools that the row does not declare, and arguments outside their schema
    undeclared_calls: Literal["warn", "refuse"]
    # what to do with reasoning_content; train teaches it in turns after the last question, for a server with
    # thinking on
    reasoning: Literal["drop", "train"]
    # the stage fails if a larger share of the rows is bad
    max_reject_share: float
