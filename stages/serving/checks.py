"""Deterministic checks for nine ways in which a voice assistant misbehaves. The same answer always gets the
same verdict.

Stage evaluate scores with them. As a program, `python checks.py`, this reads {"question": ..., "answer": ...}
and prints the failures as JSON: `build.py serve` asks the checks that the served artifact brings.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from typing import Any

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

# Pictographs, dingbats, flags, and the selectors that turn a plain character into an emoji.
EMOJI = re.compile(
    "[\U0001f000-\U0001faff\u231a\u231b\u23e9-\u23fa\u2600-\u27bf\u2b00-\u2bff\ufe0f\u20e3"
    "\U000e0020-\U000e007f]"
)
MARKDOWN = re.compile(
    r"\*\*|__|`|(?<!\w)\*\S[^*\n]*\*|^\s{0,3}#{1,6}\s|^\s*[-*+\u2022]\s|^\s*\d+[.)]\s"
    r"|\[[^\]]+\]\([^)]+\)|^\s*\|.*\|\s*$|^\s*>\s",
    re.MULTILINE,
)
THINK = re.compile(r"</?think>")
LEAK = re.compile(
    r"</?tool_call>|<function=|<parameter=|</function>|<tool_response>|\"arguments\"\s*:|\b\w+\(\s*\w+\s*="
)
JSON_OBJECT = re.compile(r"\{\s*\"\w+\"\s*:")
ASKS_LAST = re.compile(r"\?\W*$")  # emoji and quotes may follow the question mark
FOLLOW_UP = re.compile(
    r"\b(would you like|shall i|do you want|want me to|can i help|anything else|let me know)\b", re.IGNORECASE
)
NOT_KNOWN = re.compile(
    r"\b(no memory|not in (my )?memory|do(n['\u2019]t| not) (know|have|remember)|not sure|no record|no idea"
    r"|(never|have not|haven['\u2019]t) told|can(not|['\u2019]t) (recall|remember))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """One fault of one answer; `mode` is one of MODES."""

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


def failures(question: dict[str, Any], answer: dict[str, Any]) -> list[Failure]:
    """What is wrong with `answer` (an OpenAI message plus `finish_reason`) to `question` (docs/formats.md,
    Questions).

    An empty answer is a verbosity failure ("says nothing") if speech was expected, and a wrong_tool failure
    if a call was expected. An answer without the words of `must_say` is a fabrication: it does not state the
    fact that was asked for. If `unknown` is set, the answer has to admit that it does not know; `must_say` is
    then not checked.
    """
    expect = question.get("expect", {})
    text = answer.get("content") or ""
    calls = answer.get("tool_calls") or []
    failures = [*_style_failures(text), *_leak_failures(question, text), *_call_failures(expect, calls)]
    if THINK.search(text) or (answer.get("reasoning") or answer.get("reasoning_content") or "").strip():
        failures.append(Failure("think_leak", "thoughts in the answer"))
    words = len(text.split())
    if answer.get("finish_reason") == "length":
        failures.append(Failure("verbosity", f"cut off after {words} words"))
    elif words > expect.get("max_words", 40):
        failures.append(Failure("verbosity", f"{words} words, at most {expect.get('max_words', 40)}"))
    elif not words and not calls and "tool" not in expect:
        failures.append(Failure("verbosity", "says nothing"))
    if "tool" not in expect:
        failures += _content_failures(expect, text)
    return failures


def _style_failures(text: str) -> list[Failure]:
    failures = []
    if match := EMOJI.search(text):
        failures.append(Failure("emoji", match.group()))
    if match := MARKDOWN.search(text):
        failures.append(Failure("markdown", match.group().strip() or "markdown"))
    if ASKS_LAST.search(text) or FOLLOW_UP.search(text):
        failures.append(Failure("follow_up", text.strip()[-60:]))
    return failures


def _leak_failures(question: dict[str, Any], text: str) -> list[Failure]:
    if match := LEAK.search(text) or JSON_OBJECT.search(text):
        return [Failure("tool_leak", match.group())]
    # A tool's name with an underscore is never spoken; a name such as `search` may be an ordinary word.
    names = [tool.get("function", tool)["name"] for tool in question.get("tools", [])]
    return [Failure("tool_leak", name) for name in names if "_" in name and name in text][:1]


def _call_failures(expect: dict[str, Any], calls: list[dict[str, Any]]) -> list[Failure]:
    calls_made = []
    for call in calls:
        try:
            calls_made.append((call["function"]["name"], json.loads(call["function"]["arguments"])))
        except (TypeError, ValueError):
            return [Failure("wrong_tool", f"arguments of {call['function']['name']} are not JSON")]
    if expected := expect.get("tool"):
        if calls_made != [(expected["name"], expected["arguments"])]:
            return [
                Failure(
                    "wrong_tool",
                    f"called {calls_made or 'nothing'}, wanted {expected['name']} {expected['arguments']}",
                )
            ]
    elif calls_made and expect.get("no_tool"):
        return [Failure("wrong_tool", f"called {calls_made}, wanted none")]
    return []


def _content_failures(expect: dict[str, Any], text: str) -> list[Failure]:
    failures = []
    lower_text = text.lower()
    if expect.get("unknown") and not NOT_KNOWN.search(text):
        failures.append(Failure("fabrication", "does not say that it is not known"))
    for phrase in expect.get("must_say", []):
        options = phrase if isinstance(phrase, list) else [phrase]
        if not expect.get("unknown") and not any(option.lower() in lower_text for option in options):
            failures.append(Failure("fabrication", f"does not say {' or '.join(options)}"))
    for banned in expect.get("must_not_say", []):
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
