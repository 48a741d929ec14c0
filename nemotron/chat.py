"""Conversations as the model reads them: rendered with its own template, and the tokens that are trained.

A plain answer is rendered as `<|im_start|>assistant\\n<think></think>Hello.<|im_end|>\\n`. A server that runs with
`enable_thinking=false` supplies everything up to and including `<think></think>`, so the trained span begins right after
it and ends with `<|im_end|>`, which the model has to say to stop.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

IGNORED = -100  # the label that cross-entropy skips
PAD = 0  # <unk>. The tokenizer has no pad token, and its eos is <|im_end|>: padding with that would mask every answer's end
SUPPLIED = "<think></think>"  # what the generation prompt ends in when thinking is off

_ASSISTANT = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)
ROLES = ("system", "user", "assistant", "tool")


class ChatError(ValueError):
    """A conversation that cannot be rendered or trained on; the message is the reason."""


@dataclass(frozen=True)
class Rendered:
    """`input_ids` and `labels` have one entry per token; a label is IGNORED where nothing is trained."""

    text: str
    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def normalise(messages: list[dict]) -> list[dict]:
    """`messages` with every tool call's `arguments` as a mapping, which the template wants; the input is not changed.

    Key order stays. Values stay what JSON made of them, and so the template writes `true` as `True` and `null` as `None`:
    what a model says to vLLM's parser is the same text, so the two agree. Keys that are absent stay absent: rows never go
    through Arrow, which would add them as None.

    Raises ChatError if `arguments` is neither a mapping nor a string that holds a JSON object.
    """
    result = []
    for message in messages:
        if message.get("tool_calls"):
            message = {**message, "tool_calls": [_call(call) for call in message["tool_calls"]]}
        result.append(message)
    return result


def _call(call: dict) -> dict:
    function = call.get("function", call)
    if not isinstance(function, dict) or not function.get("name"):
        raise ChatError("a tool call without a function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise ChatError(f"arguments of {function['name']} are not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ChatError(f"arguments of {function['name']} are {type(arguments).__name__}, not an object")
    return {**call, "function": {**function, "arguments": arguments}}


def template_text(tokenizer, messages: list[dict], tools: list[dict] | None = None, generation: bool = False) -> str:
    """The conversation as text, by the tokenizer's own template; `generation` adds the prompt of the next answer."""
    if "strftime_now" in (tokenizer.chat_template or ""):
        raise ChatError("the chat template calls strftime_now: the same conversation would render differently tomorrow")
    return tokenizer.apply_chat_template(
        normalise(messages), tools=tools or None, tokenize=False, add_generation_prompt=generation, enable_thinking=False
    )


def render(tokenizer, messages: list[dict], tools: list[dict] | None = None) -> Rendered:
    """Text, tokens and labels of one conversation. Raises ChatError if the spans cannot be told for sure."""
    text = template_text(tokenizer, messages, tools)
    spans = [match.span(1) for match in _ASSISTANT.finditer(text)]
    answers = sum(message["role"] == "assistant" for message in messages)
    if len(spans) != answers:
        raise ChatError(f"{answers} assistant turns but {len(spans)} in the rendered text: a message holds the template's own markers")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [IGNORED] * len(encoded["input_ids"])
    starts = [start + len(SUPPLIED) if text.startswith(SUPPLIED, start) else start for start, _ in spans]
    ends = [end for _, end in spans]
    at = 0
    for index, (first, last) in enumerate(encoded["offset_mapping"]):
        while at < len(ends) and first >= ends[at]:
            at += 1
        if at < len(ends) and first >= starts[at] and last <= ends[at]:
            labels[index] = encoded["input_ids"][index]
    return Rendered(text, encoded["input_ids"], labels)
