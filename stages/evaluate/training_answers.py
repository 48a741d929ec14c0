"""The checks of behaviour on the answers that are trained: a model that learns an answer which fails a check
fails that check too, and no gate can be passed.

This module uses the standard library alone, because it also runs on the host before the first stage
(stages/evaluate/sources.py).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from stages.check import Finding
from stages.evaluate.questions import function
from stages.serving import checks

MOST_EMOJI = 6  # of more kinds, the remedy does not list them


@dataclass(frozen=True)
class Answer:
    """A text that is trained; `place` is the file and line of its conversation."""

    place: str
    text: str
    tools: list[dict[str, Any]]


def trained(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Answer]:
    """The texts of the assistant that are trained, of (place, row) with a row's `messages` and `tools`."""
    for place, row in rows:
        tools = row.get("tools")
        names = [function(tool).get("name") for tool in (tools if isinstance(tools, list) else [])]
        for message in row["messages"]:
            left_out = message.get("train") is False or message.get("weight") == 0
            text = message.get("content")
            if message["role"] == "assistant" and not left_out and text and text.strip():
                yield Answer(place, text, [{"name": name} for name in names if isinstance(name, str)])


def findings(answers: Iterable[Answer], settings: dict[str, Any]) -> list[Finding]:
    """A warning for every check that training answers fail under the recipe's `settings`."""
    failed: dict[str, list[tuple[Answer, str]]] = defaultdict(list)
    total = 0
    for answer in answers:
        total += 1
        for mode, detail in _failures(answer, settings).items():
            failed[mode].append((answer, detail))
    return [
        Finding(
            f"evaluate.checks.{mode}",
            f"{len(failed[mode])} of {total} training answers that fail it, the first at"
            f" {failed[mode][0][0].place}: {json.dumps(failed[mode][0][1], ensure_ascii=False)}",
            "answers that the check lets pass, since a model that learns these fails it",
            "If they are right, write in the recipe evaluate: {checks: {"
            f"{mode}: {_yaml(setting_for(mode, [answer for answer, _ in failed[mode]], settings))}"
            "}}, else mend them.",
            "warning",
        )
        for mode in checks.MODES
        if mode in failed
    ]


def setting_for(mode: str, failed: list[Answer], settings: dict[str, Any]) -> Any:
    """The setting of a check that lets its `failed` answers pass and still asks for the rest: False, which is
    off, if there is none.
    """
    given = settings.get(mode, True)
    given = given if isinstance(given, dict) else {}
    setting = {**given, **_relaxed(mode, [answer.text for answer in failed], given)}
    passes = all(mode not in _failures(answer, {**settings, mode: setting}) for answer in failed)
    return setting if passes else False


def _relaxed(mode: str, texts: list[str], given: dict[str, Any]) -> dict[str, Any]:
    match mode:
        case "verbosity":
            longest = max(len(text.split()) for text in texts)
            return {"max_words": -(-longest // 10) * 10}
        case "markdown":
            kinds = [
                kind
                for kind, pattern in checks.MARKDOWN.items()
                if any(re.search(pattern, text, re.MULTILINE) for text in texts)
            ]
            return {"allowed": list(dict.fromkeys([*given.get("allowed", []), *kinds]))}
        case "emoji":
            used = dict.fromkeys(emoji for text in texts for emoji in checks.EMOJI.findall(text))
            return {"allowed": [*given.get("allowed", []), *used]} if len(used) <= MOST_EMOJI else {}
        case "follow_up":
            asking = [text.count("?") for text in texts if checks.ASKS_LAST.search(text)]
            phrases = given.get("phrases", checks.PHRASES)
            unsaid = [
                phrase for phrase in phrases if not any(checks.says_any([phrase], text) for text in texts)
            ]
            marks = {"question_marks": max(asking)} if asking else {}
            return marks | ({"phrases": unsaid} if len(unsaid) < len(phrases) else {})
        case "fabrication":
            banned = given.get("must_not_say", [])
            unsaid = [word for word in banned if not any(word.lower() in text.lower() for text in texts)]
            return {"must_not_say": unsaid}
        case _:
            return {}


def _failures(answer: Answer, settings: dict[str, Any]) -> dict[str, str]:
    """Failure mode -> detail of the first failure."""
    question = {"tools": answer.tools, "expect": {"checks": settings}}
    found = checks.failures(question, {"content": answer.text})
    return {failure.mode: failure.detail for failure in reversed(found)}


def _yaml(value: Any) -> str:
    """A setting as it is written in a recipe."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_yaml(inner)}' for key, inner in value.items())}}}"
    return "off" if value is False else json.dumps(value, ensure_ascii=False)
