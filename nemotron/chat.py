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
_THINK = re.compile(r"</?think>")
MARKERS = ("<|im_start|>", "<|im_end|>")
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

    Key order stays, and absent keys stay absent: rows never go through Arrow, which would add them as None. Values stay
    what JSON made of them, so the template writes `true` as `True` and `1.0` as `1.0`, just as a server does that renders
    the same history. Only null is refused: it would be trained as the word None, which no parser reads back as null.

    Raises ChatError if `arguments` is neither a mapping nor a string that holds a JSON object, or if one of them is null.
    """
    result = []
    for message in messages:
        if calls := message.get("tool_calls"):
            if not isinstance(calls, list):
                raise ChatError(f"tool_calls is {type(calls).__name__}, not a list")
            message = {**message, "tool_calls": [_call(call) for call in calls]}
        result.append(message)
    return result


def _call(call: dict) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
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
    if absent := [key for key, value in arguments.items() if value is None]:
        raise ChatError(f"argument {absent[0]} of {function['name']} is null: leave it out")
    return {**call, "function": {**function, "arguments": arguments}}


def template_text(tokenizer, messages: list[dict], tools: list[dict] | None = None, generation: bool = False) -> str:
    """The conversation as text, by the tokenizer's own template; `generation` adds the prompt of the next answer."""
    if "strftime_now" in (tokenizer.chat_template or ""):
        raise ChatError("the chat template calls strftime_now: the same conversation would render differently tomorrow")
    return tokenizer.apply_chat_template(
        normalise(messages), tools=tools or None, tokenize=False, add_generation_prompt=generation, enable_thinking=False
    )


def render(tokenizer, messages: list[dict], tools: list[dict] | None = None) -> Rendered:
    """Text, tokens and labels of one conversation; every assistant turn is trained, from after SUPPLIED up to `<|im_end|>`.

    The newline after `<|im_end|>` is the template's, not the model's: a server stops before it, so it is not trained.
    Needs a fast tokenizer (offsets). Raises ChatError if a message holds the template's own markers or thoughts, since the
    trained spans could then not be told for sure, or would not follow from the prompt that a server sends.
    """
    for position, message in enumerate(messages, 1):
        _refuse_markers(message, position)
    text = template_text(tokenizer, messages, tools)
    spans = [match.span(1) for match in _ASSISTANT.finditer(text)]
    answers = sum(message["role"] == "assistant" for message in messages)
    if len(spans) != answers:
        raise ChatError(f"{answers} assistant turns but {len(spans)} in the rendered text: a tool or an argument holds the template's own markers")
    if not all(text.startswith(SUPPLIED, start) for start, _ in spans):
        raise ChatError(f"an assistant turn that does not begin with {SUPPLIED}: the template is not the one Annie is served with")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [IGNORED] * len(encoded["input_ids"])
    starts = [start + len(SUPPLIED) for start, _ in spans]
    ends = [end for _, end in spans]
    at = 0
    for index, (first, last) in enumerate(encoded["offset_mapping"]):
        while at < len(ends) and first >= ends[at]:
            at += 1
        if at < len(ends) and first >= starts[at] and last <= ends[at]:
            labels[index] = encoded["input_ids"][index]
    return Rendered(text, encoded["input_ids"], labels)


def _refuse_markers(message: dict, position: int) -> None:
    content = message.get("content") or ""
    for marker in MARKERS:
        if marker in content:
            raise ChatError(f"message {position} holds {marker}, which only the template may write")
    if message["role"] == "assistant" and (_THINK.search(content) or str(message.get("reasoning_content") or "").strip()):
        raise ChatError(f"message {position} thinks aloud: Annie is served with thinking off, so its prompt already closes the think block")
