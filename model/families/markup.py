"""Finds text that would be read as something else: control tokens, markup, calls written as text.

A template pastes text into markup and escapes nothing, and a tokenizer reads its added tokens anywhere. A
text with such a string is therefore misread, in training and when it is served.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The template's own, and vLLM's qwen3_coder parser, which allows blanks inside <parameter=...> and
# </parameter>.
TEMPLATE_TOKENS = ("<|im_start|>", "<|im_end|>")
TEMPLATE_MARKUP = (
    r"</?think>",
    r"</?tool_call>",
    r"</?tool_response>",
    r"<function=",
    r"</function>",
    r"<\s*parameter\s*=",
    r"<\s*/\s*parameter\s*>",
)
OWN_CALLS = ("<tool_call>", "<function=")
# How other model families write a call. To this model it is text, which its parser does not read.
FOREIGN_CALLS = ("<functioncall>", "<function_call>", "<|python_tag|>", "[TOOL_CALLS]", "<tool_use>")
# {"name": "set_timer", "arguments": {...}}, wherever it stands in an answer; either order of the two keys.
_JSON_CALL = re.compile(
    r'"name"\s*:\s*"[^"\n]*"\s*,\s*"(?:arguments|parameters)"\s*:\s*[{"]'
    r'|"(?:arguments|parameters)"\s*:\s*\{[^{}]*\}\s*,\s*"name"\s*:\s*"'
    r'|"(?:tool_calls|function_call)"\s*:\s*[\[{]'
)
# Keys whose meaning the template knows; every other key of a definition is written as <key>value</key>.
_KNOWN_KEYS = {
    "tool": ("type", "name", "description", "parameters"),
    "parameters": ("type", "properties", "required"),
    "property": ("name", "type", "description", "enum"),
}

_patterns: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, re.Pattern[str]]] = WeakKeyDictionary()


def pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """One expression for every string that no text may contain, compiled once for each tokenizer."""
    size, compiled = _patterns.get(tokenizer, (-1, None))
    if compiled is None or size != len(tokenizer):
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}  # special ones too
        tokens = added | set(TEMPLATE_TOKENS)
        literals = sorted((re.escape(token) for token in tokens if token.strip()), key=len, reverse=True)
        compiled = re.compile("|".join([*literals, *TEMPLATE_MARKUP]))
        _patterns[tokenizer] = (len(tokenizer), compiled)
    return compiled


def written_call(text: str, tools: list[dict[str, Any]]) -> str | None:
    """The part of an answer that is a call written as text: foreign markup, JSON, or name(...) alone."""
    for marker in (*OWN_CALLS, *FOREIGN_CALLS):
        if marker in text:
            return marker
    if match := _JSON_CALL.search(text):
        return match.group().partition(":")[0] + ": ... in JSON"
    alone = text.strip().removeprefix("[").removesuffix("]").strip()
    for tool in tools:
        name = tool["function"]["name"]
        if alone.startswith(f"{name}(") and alone.endswith(")"):
            return f"{name}("
    return None


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings(part)


def tags(function: dict[str, Any]) -> Iterator[str]:
    """The tags that the template makes of a definition's extra keys: a key `s` is written as <s>."""
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties")
    levels = [("tool", function), ("parameters", parameters)]
    levels += [
        ("property", schema)
        for schema in (properties.values() if isinstance(properties, dict) else ())
        if isinstance(schema, dict)
    ]
    for level, schema in levels:
        for key in schema:
            if key not in _KNOWN_KEYS[level]:
                yield f"<{key}>"
                yield f"</{key}>"
