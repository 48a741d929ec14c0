"""What a client asks: refused where it is beyond the limits or of a wrong type, and completed with the
production prompt where it has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

PROMPT_ROLES = ("system", "developer")
OBJECTS = ("structured_outputs", "response_format")


class Refusal(Exception):
    """A request that is answered here: the status and the sentence that its sender gets."""

    def __init__(self, status: int, text: str, headers: tuple[tuple[bytes, bytes], ...] = ()):
        super().__init__(text)
        self.status, self.text, self.headers = status, text, headers


def checked(
    body: bytes, choices: int, tokens: int, refused: re.Pattern[str]
) -> tuple[dict[str, Any] | None, int]:
    """The request as JSON, None where it is none (vLLM says what is wrong then), and its weight: how many
    answers it asks for. Refusal of one with more than `choices` answers or `tokens` tokens, with a string
    that `refused` matches, or with a field of a type that vLLM cannot take.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None, 1
    if not isinstance(request, dict):
        return None, 1
    prompts = request.get("prompt")
    batch = len(prompts) if isinstance(prompts, list) and prompts and not _is_tokens(prompts) else 1
    each = max(1, _number(request.get("n")), _number(request.get("best_of")))
    if (weight := batch * each) > choices:
        raise Refusal(400, f"{weight:,} answers in one request; this server gives {choices:,}.")
    for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
        if (asked := _number(request.get(name))) > tokens:
            raise Refusal(400, f"{name} is {asked:,}; this server allows {tokens:,}.")
    _refuse_mistyped(request)
    # A raw prompt is whole turns by its nature; everything else is text of one.
    texts = {key: value for key, value in request.items() if key != "prompt"}
    for text in _strings(texts):
        if token := refused.search(text):
            raise Refusal(
                400,
                f"A text holds the control token {token[0]}, which would be read as the conversation's"
                " own markup. Leave it out, or write it another way.",
            )
    return request, weight


def _refuse_mistyped(request: dict[str, Any]) -> None:
    """Refusal of what vLLM 0.25 to 0.32 answer with 500, though the request is at fault."""
    for name, value in request.items():
        if name in OBJECTS and value is not None and not isinstance(value, dict):
            raise Refusal(400, f"{name} is a JSON {_kind(value)}; an object is expected.")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise Refusal(400, f"{name} is a number beyond 64 bits.")
    for text in _strings(request):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refusal(400, "A text holds half of a surrogate pair, which is no character.") from None


def _kind(value: object) -> str:
    """What JSON calls a value that is no object."""
    if isinstance(value, bool):
        return "boolean"
    return "array" if isinstance(value, list) else "string" if isinstance(value, str) else "number"


def with_prompt(request: dict[str, Any] | None, prompt: str) -> dict[str, Any] | None:
    """The request with `prompt` as its system message; None where it has a prompt of its own, or no list of
    messages. A blank one counts as none, because the template renders the two alike.
    """
    messages = request.get("messages") if request else None
    if not request or not isinstance(messages, list) or not messages:
        return None
    own = [m for m in messages if isinstance(m, dict) and m.get("role") in PROMPT_ROLES]
    if not all(_is_blank(message.get("content")) for message in own):
        return None
    others = [message for message in messages if message not in own]
    return {**request, "messages": [{"role": "system", "content": prompt}, *others]}


def _is_blank(content: object) -> bool:
    """Whether a message's content, a string or a list of parts, is empty or blanks alone."""
    if isinstance(content, list):
        return all(
            isinstance(part, dict) and part.get("type") == "text" and _is_blank(part.get("text"))
            for part in content
        )
    return content is None or (isinstance(content, str) and not content.strip())


def _number(value: object) -> int:
    """A whole number as vLLM reads it, which takes "2000" and 2000.0 for 2000; 0 for what is none. Beyond
    10**18 they are all one.
    """
    try:
        number = value if isinstance(value, int) else float(value) if isinstance(value, float | str) else 0
    except ValueError:
        return 0
    return int(min(number, 10**18)) if number > 0 else 0  # not a number is not above 0


def _is_tokens(prompts: list[Any]) -> bool:
    """Whether a list is one prompt in token ids, not several prompts."""
    return all(isinstance(prompt, int) for prompt in prompts)


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches each of `tokens`, the longest where several begin alike. The model has a thousand, and requests
    have megabytes: one expression in which each shared beginning stands once reads a text a single time,
    while alternatives side by side would be tried one by one at every "<".
    """
    root: dict[str, Any] = {}
    for token in tokens:
        node = root
        for character in token:
            node = node.setdefault(character, {})
        node[""] = {}  # a token ends here

    def expression(node: dict[str, Any]) -> str:
        ways = [re.escape(character) + expression(after) for character, after in node.items() if character]
        if len(ways) < 2 and ("" not in node or not ways):
            return "".join(ways)
        return f"(?:{'|'.join(ways)}){'?' * ('' in node)}"

    return re.compile(expression(root) or "(?!)")


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    rest = [value]
    while rest:
        part = rest.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            rest += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            rest += part
