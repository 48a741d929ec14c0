"""The questions that failed and how, for the person who made them. They may be private conversations: this is
part of report.md and answers.jsonl alone, and stage package reads neither.
"""

from __future__ import annotations

import json
from typing import Any

from stages.job import printable
from stages.serving.checks import Failure

MOST = 50  # questions of a column that are listed; answers.jsonl has all
LONGEST = 160  # characters of a text


def markdown(
    questions: list[dict[str, Any]],
    answers: dict[str, list[dict[str, Any]]],
    failures: dict[str, list[list[Failure]]],
) -> str:
    """A section for tuned (merged, if tuned was not asked) and one for nvfp4, each if it failed any."""
    columns = ["tuned" if "tuned" in failures else "merged", "nvfp4"]
    return "".join(
        _section(column, questions, answers[column], failures[column])
        for column in columns
        if any(failures[column])
    )


def _section(
    column: str,
    questions: list[dict[str, Any]],
    answers: list[dict[str, Any]],
    failures: list[list[Failure]],
) -> str:
    failed = [number for number, faults in enumerate(failures) if faults]
    entries = [_entry(questions[n], answers[n], failures[n]) for n in failed[:MOST]]
    more = f"\nand {len(failed) - MOST} more, in answers.jsonl\n" if len(failed) > MOST else ""
    return f"\n## Failed by {column}: {len(failed)} of {len(questions)}\n\n" + "".join(entries) + more


def _entry(question: dict[str, Any], answer: dict[str, Any], faults: list[Failure]) -> str:
    asked = next(m["content"] for m in reversed(question["messages"]) if m["role"] == "user")
    lines = [f"- {question['id']}: {_shown(asked)}", f"  - answer: {_shown(answer.get('content') or '')}"]
    lines += [
        f"  - calls: {call['function']['name']} {_shown(call['function']['arguments'] or '')}"
        for call in answer.get("tool_calls") or []
    ]
    lines += [f"  - {fault.mode}: {_shown(fault.detail)}" for fault in faults]
    return "".join(printable(line) + "\n" for line in lines)


def _shown(text: str) -> str:
    """A text on one line, in quotes, and its beginning if it is long."""
    line = " ".join(text.split())
    return json.dumps(line if len(line) <= LONGEST else f"{line[:LONGEST]}...", ensure_ascii=False)
