"""Deterministic checks for nine ways in which an assistant misbehaves. The same answer always gets the same
verdict.

They are a voice assistant's: `expect.checks` of a question switches each off, or sets it (docs/formats.md,
The checks). Stage evaluate scores with them. As a program, `python -m stages.serving.checks`, this reads
{"question": ..., "answer": ...} and prints the failures as JSON: `build.py serve` asks the checks that the
served artifact brings.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from stages.serving import expected_calls, json_schema, patterns

MODES = (
    "emoji",
    "markdown",
    "verbosity",
    "follow_up",
    "tool_leak",
    "fabrication",
    "wrong_tool",
    "name_error",
    "think_leak",
)
FORM = "form"  # the failure mode of `regex` and `json_schema`, which a question alone asks for
MOST_WORDS = 40

# Pictographs, dingbats, flags, and the selectors that turn a plain character into an emoji.
EMOJI = re.compile(
    "[\U0001f000-\U0001faff\u231a\u231b\u23e9-\u23fa\u2600-\u27bf\u2b00-\u2bff\ufe0f\u20e3"
    "\U000e0020-\U000e007f]"
)
MARKDOWN = {
    "bold": r"\*\*|__",
    "code": r"`",
    "italic": r"(?<![\w*])\*[^\s*][^*\n]*\*(?!\*)",
    "heading": r"^\s{0,3}#{1,6}\s",
    "list": r"^\s*[-*+\u2022]\s",
    "numbered_list": r"^\s*\d+[.)]\s",
    "link": r"\[[^\[\]]+\]\([^)]+\)",
    "table": r"^\s*\|.*\|\s*$",
    "quote": r"^\s*>\s",
}
THINK = re.compile(r"</?think>")
LEAK = re.compile(r"</?tool_call>|<function=|<parameter=|</function>|<tool_response>|\b\w+\(\s*\w+\s*=")
JSON_LEAK = re.compile(r"\"arguments\"\s*:|\{\s*\"\w+\"\s*:")
ASKS_LAST = re.compile(r"\?\W*$")  # emoji and quotes may follow the question mark
PHRASES = (
    "would you like",
    "shall i",
    "do you want",
    "want me to",
    "can i help",
    "anything else",
    "let me know",
)
NOT_KNOWN = re.compile(
    r"\b(no memory|not in (my )?memory|do(n['\u2019]t| not) (know|have|remember)|not sure|no record|no idea"
    r"|(never|have not|haven['\u2019]t) told|can(not|['\u2019]t) (recall|remember))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """One fault of one answer; `mode` is one of MODES, or FORM."""

    mode: str
    detail: str


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance between two words, in edits."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def settings(question: dict[str, Any], mode: str) -> dict[str, Any] | None:
    """What a question sets of the check `mode`, which may be nothing; None if the check is off."""
    value = question.get("expect", {}).get("checks", {}).get(mode, True)
    return value if isinstance(value, dict) else {} if value else None


def off(question: dict[str, Any]) -> list[str]:
    """The checks that a question switches off."""
    return [mode for mode in MODES if settings(question, mode) is None]


def failures(question: dict[str, Any], answer: dict[str, Any]) -> list[Failure]:
    """What is wrong with `answer` (an OpenAI message plus `finish_reason`) to `question` (docs/formats.md,
    Questions).

    An empty answer is a verbosity failure ("says nothing") if speech was expected, and a wrong_tool failure
    if a call was expected; whatever is off, it fails. An answer without the words of `must_say` is a
    fabrication: it does not state the fact that was asked for. If `unknown` is set, the answer has to admit
    that it does not know; `must_say` is then not checked.
    """
    expect = question.get("expect", {})
    text = answer.get("content") or ""
    calls = answer.get("tool_calls") or []
    found = [
        *_style_failures(question, text),
        *_leak_failures(question, text),
        *_call_failures(expect, calls),
    ]
    if THINK.search(text) or (answer.get("reasoning") or answer.get("reasoning_content") or "").strip():
        found.append(Failure("think_leak", "thoughts in the answer"))
    words = len(text.split())
    most = expect.get("max_words", (settings(question, "verbosity") or {}).get("max_words", MOST_WORDS))
    if answer.get("finish_reason") == "length":
        found.append(Failure("verbosity", f"cut off after {words} words"))
    elif words > most:
        found.append(Failure("verbosity", f"{words} words, at most {most}"))
    if "tool" not in expect and "calls" not in expect:
        found += _content_failures(question, text)
        found += _form_failures(expect, text)
    found = [failure for failure in found if settings(question, failure.mode) is not None]
    if not words and not calls and not any(f.mode in ("verbosity", "wrong_tool") for f in found):
        found.append(Failure("verbosity", "says nothing"))
    return found


def _style_failures(question: dict[str, Any], text: str) -> list[Failure]:
    emoji, markdown, follow_up = (settings(question, m) or {} for m in ("emoji", "markdown", "follow_up"))
    failures = []
    if match := EMOJI.search(_without(emoji.get("allowed", []), text)):
        failures.append(Failure("emoji", match.group()))
    kinds = [pattern for kind, pattern in MARKDOWN.items() if kind not in markdown.get("allowed", [])]
    if kinds and (match := re.search("|".join(kinds), text, re.MULTILINE)):
        failures.append(Failure("markdown", match.group().strip() or "markdown"))
    asks = ASKS_LAST.search(text) and text.count("?") > follow_up.get("question_marks", 0)
    if asks or says_any(follow_up.get("phrases", PHRASES), text):
        failures.append(Failure("follow_up", text.strip()[-60:]))
    return failures


def _without(allowed: list[str], text: str) -> str:
    """`text` without some emoji. A selector (U+FE0F) that follows one belongs to it."""
    for emoji in sorted(allowed, key=len, reverse=True):
        text = re.sub(re.escape(emoji.rstrip("\ufe0f")) + "\ufe0f?", "", text)
    return text


def says_any(phrases: Iterable[str], text: str) -> bool:
    """Whether one of `phrases` stands in `text` as whole words, in any letter case."""
    return _any_of(tuple(phrases)).search(text) is not None


@lru_cache
def _any_of(phrases: tuple[str, ...]) -> re.Pattern[str]:
    nothing = "(?!)"  # never matches
    return re.compile(rf"(?<!\w)({'|'.join(map(re.escape, phrases)) or nothing})(?!\w)", re.IGNORECASE)


def _leak_failures(question: dict[str, Any], text: str) -> list[Failure]:
    asked_for_json = "json_schema" in question.get("expect", {})
    if match := LEAK.search(text) or (None if asked_for_json else JSON_LEAK.search(text)):
        return [Failure("tool_leak", match.group())]
    # A tool's name with an underscore is never spoken; a name such as `search` may be an ordinary word.
    names = [tool.get("function", tool)["name"] for tool in question.get("tools", [])]
    return [Failure("tool_leak", name) for name in names if "_" in name and name in text][:1]


def _call_failures(expect: dict[str, Any], calls: list[dict[str, Any]]) -> list[Failure]:
    try:
        fault = expected_calls.fault(expect, calls)
    except patterns.TooSlow as slow:
        fault = _too_slow(slow)
    return [Failure("wrong_tool", fault)] if fault else []


def _form_failures(expect: dict[str, Any], text: str) -> list[Failure]:
    try:
        missed = [regex for regex in expect.get("regex", []) if not patterns.found(regex, text)]
        faults = [f"does not match {regex}" for regex in missed]
        if "json_schema" in expect:
            faults += json_schema.mismatches(expect["json_schema"], json.loads(text))
    except patterns.TooSlow as slow:
        faults = [_too_slow(slow)]
    except (ValueError, RecursionError):
        faults = ["is not JSON"]
    return [Failure(FORM, fault) for fault in faults]


def _too_slow(slow: patterns.TooSlow) -> str:
    return f"the search for {slow} did not end within {patterns.SECONDS:g} s"


def _content_failures(question: dict[str, Any], text: str) -> list[Failure]:
    expect, banned_everywhere = question.get("expect", {}), settings(question, "fabrication") or {}
    failures = []
    lower_text = text.lower()
    if expect.get("unknown") and not NOT_KNOWN.search(text):
        failures.append(Failure("fabrication", "does not say that it is not known"))
    for phrase in expect.get("must_say", []):
        options = phrase if isinstance(phrase, list) else [phrase]
        if not expect.get("unknown") and not any(option.lower() in lower_text for option in options):
            failures.append(Failure("fabrication", f"does not say {' or '.join(options)}"))
    for banned in [*expect.get("must_not_say", []), *banned_everywhere.get("must_not_say", [])]:
        if banned.lower() in lower_text:
            failures.append(Failure("fabrication", f"says {banned!r}"))
    words = re.findall(r"[^\W\d_]+", text)
    for name in expect.get("names", []):
        # Common words are close to short names (`am` and Ram), so a misspelling must share the first letter.
        same_initial = [w for w in words if w not in expect["names"] and w[0].lower() == name[0].lower()]
        misspelt = [w for w in same_initial if edit_distance(w, name) <= (1 if len(name) < 6 else 2)]
        if misspelt or name not in words:
            failures.append(Failure("name_error", f"{misspelt[0]} for {name}" if misspelt else f"no {name}"))
    return failures


def main() -> None:
    exchange = json.load(sys.stdin)
    found = failures(exchange["question"], exchange["answer"])
    print(json.dumps([asdict(failure) for failure in found]))


if __name__ == "__main__":
    main()
