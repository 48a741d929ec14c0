"""Renders conversations with the model's own template, and marks the tokens that are trained.

A plain answer is rendered as `<|im_start|>assistant\\n<think></think>Hello.<|im_end|>\\n`. A server with
`enable_thinking=false` supplies everything up to and including `<think></think>`. So the trained span begins
right after it, and ends with `<|im_end|>`, which the model must produce to stop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import jinja2

from model.families import limits, markup
from model.families.chat import Chat, Rendered
from model.families.messages import CALL_AS_TEXT, ROLES, ChatError, normalise, served_tools
from model.labels import IGNORED
from model.weights.paths import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "PAD",
    "ROLES",
    "SUPPLIED",
    "ChatError",
    "Rendered",
    "normalise",
    "render",
    "served_tools",
    "template_text",
]

# <unk>. The tokenizer has no pad token, and its eos is <|im_end|>: padding with that would mask every
# answer's end
PAD = 0
SUPPLIED = "<think></think>"  # end of the generation prompt when thinking is off
THINKING = "<think>\n"  # end of the generation prompt when thinking is on

_TURN = "<|im_start|>assistant\n"
_END = "<|im_end|>"


def template_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    generation: bool = False,
    reasoning: bool = False,
) -> str:
    """The conversation as text, from the tokenizer's own template. `generation` adds the next answer's
    prompt.

    Without `reasoning` thoughts are left out, and the prompt is that of a server with
    `enable_thinking=false`. With it the prompt is that of `enable_thinking=true`, and thoughts after the last
    user message are kept, as the template requires.
    """
    return _text(tokenizer, normalise(messages), served_tools(tools), generation, reasoning)


def _text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    generation: bool,
    reasoning: bool,
) -> str:
    if "strftime_now" in (tokenizer.chat_template or ""):
        raise ChatError(
            "the chat template calls strftime_now: the same conversation would render differently tomorrow"
        )
    last_user = _last_user(messages)
    history = [
        (
            message
            if reasoning and number > last_user
            else {key: value for key, value in message.items() if key != "reasoning_content"}
        )
        for number, message in enumerate(messages)
    ]
    with limits.rendering():
        try:
            text = tokenizer.apply_chat_template(
                history,
                tools=cast("list[dict[Any, Any] | Callable[..., Any]] | None", tools or None),
                tokenize=False,
                add_generation_prompt=generation,
                enable_thinking=reasoning,
            )
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template cannot be read: {error}",
                "a template of Jinja",
                "Take chat_template.jinja from the model's own repository.",
            ) from error
        except (MemoryError, RecursionError):  # the limits say what they mean
            raise
        except Exception as error:  # a template is a stranger's code, which may raise anything
            raise ChatError(f"the chat template fails: {type(error).__name__}: {error}") from error
    return limits.check_length(cast(str, text))  # a text, since tokenize is false


def _last_user(messages: list[dict[str, Any]]) -> int:
    return max((number for number, message in enumerate(messages) if message["role"] == "user"), default=-1)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    reasoning: bool = False,
) -> Rendered:
    """Text, tokens and labels of one conversation.

    Every assistant turn is trained, except those with `train: False`, from after SUPPLIED up to `<|im_end|>`.
    The newline after `<|im_end|>` comes from the template and not from the model: a server stops before it,
    so it is not trained.

    With `reasoning` a turn that has `reasoning_content` is trained from after THINKING: its thoughts,
    `</think>` and its text. The template removes the thoughts of turns before the last user message, so such
    an earlier turn is context only.

    Needs a fast tokenizer (offsets). Raises ChatError if a text contains a control token, markup of the
    template or a call written as text, and if the trained tokens would not continue the tokens of the prompt
    that a server sends.
    """
    messages, tools = normalise(messages), served_tools(tools)
    _refuse_markup(tokenizer, messages, tools, reasoning)
    text = _text(tokenizer, messages, tools, False, reasoning)
    last_user = _last_user(messages)
    turns = [(number, message) for number, message in enumerate(messages) if message["role"] == "assistant"]
    pieces = text.split(_TURN)
    if len(pieces) != len(turns) + 1:
        raise ChatError(
            f"{len(turns)} assistant turns but {len(pieces) - 1} in the rendered text: "
            "the template is not the one Annie is served with"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels = encoded["input_ids"], [IGNORED] * len(encoded["input_ids"])
    starting = {first: index for index, (first, _) in enumerate(encoded["offset_mapping"])}
    supplied = {
        prompt: tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for prompt in ((SUPPLIED, THINKING) if reasoning else (SUPPLIED,))
    }
    start = len(pieces[0]) + len(_TURN)
    for (number, message), piece in zip(turns, pieces[1:], strict=True):
        thinks = "reasoning_content" in message
        prompt = THINKING if reasoning and thinks and number > last_user else SUPPLIED
        if not piece.startswith(prompt):
            raise ChatError(
                f"an assistant turn that does not begin with {prompt.strip()}: "
                "the template is not the one Annie is served with"
            )
        first, last = starting.get(start), starting.get(start + piece.find(_END))
        begin = None if first is None else first + len(supplied[prompt])
        if begin is None or last is None or ids[first:begin] != supplied[prompt]:
            raise ChatError(f"the tokens of message {number + 1} run into those of the prompt before it")
        if message.get("train", True) and not (reasoning and thinks and number < last_user):
            labels[begin : last + 1] = ids[begin : last + 1]
        start += len(piece) + len(_TURN)
    return Rendered(text, ids, labels)


def _refuse_markup(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    reasoning: bool,
) -> None:
    """Raises ChatError that names the string and its position."""
    search = markup.pattern(tokenizer).search
    for position, message in enumerate(messages, 1):
        if match := search(message["content"]):
            verb = (
                "thinks aloud: it holds"
                if message["role"] == "assistant" and "think>" in match.group()
                else "holds"
            )
            raise ChatError(f"message {position} {verb} {match.group()}, which only the template may write")
        if message["role"] != "assistant":
            continue
        if written := markup.written_call(message["content"], tools):
            raise ChatError(f"message {position} holds {written}: {CALL_AS_TEXT}")
        if reasoning and (match := search(message.get("reasoning_content", ""))):
            raise ChatError(
                f"reasoning_content of message {position} holds {match.group()}, "
                "which only the template may write"
            )
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if match := search(name) or next(filter(None, map(search, markup.strings(arguments))), None):
                raise ChatError(
                    f"message {position}: a call of {name} holds {match.group()}, "
                    "which the format cannot escape"
                )
    for tool in tools:
        function = tool["function"]
        for text in (*markup.strings(function), *markup.tags(function)):
            if match := search(text):
                raise ChatError(
                    f"tool {function['name']} holds {match.group()}, which only the template may write"
                )


NEMOTRON_H = Chat(model_type="nemotron_h", render=render)
