"""The questions that a model is asked: those of the recipe's source, or the held-out conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages import check, dataset
from stages.evaluate import overlap, questions
from stages.job import Job, StageError

SHOWN = 3  # findings that an error lists


def load(task: Job, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the source `questions`, or of the held-out conversations, whose last answer then says what
    is expected. `settings` are the recipe's checks; those of a question itself replace them, check by check.

    Questions of the source get production's prompt byte for byte, as training rows do; surrounding blanks and
    line ends are not a difference. Raises StageError if a question is not valid, has another prompt or other
    tools than production, or is in the training data.
    """
    if task.sources.get("questions"):
        question_list, findings = questions.read(task.sources["questions"][0])
        findings = (
            findings
            or production_findings(question_list, task.inputs["data"])
            or overlap.findings(
                question_list,
                ((place, row["messages"]) for place, row in training_rows(task.inputs["data"])),
            )
        )
        if findings:
            more = f"; and {len(findings) - SHOWN} more" if len(findings) > SHOWN else ""
            raise StageError(
                "; ".join(f"{f.subject}: {f.found}" for f in findings[:SHOWN]) + more,
                findings[0].expected,
                findings[0].remedy,
            )
        prompt = questions.normal_prompt((task.inputs["data"] / "prompt.txt").read_text())
        return [
            _with_checks(
                {
                    **row,
                    "messages": [
                        {**m, "content": prompt} if m["role"] == "system" else m for m in row["messages"]
                    ],
                },
                settings,
            )
            for row in (q.row for q in question_list)
        ]
    held_out = [_with_checks(row, settings) for row in _held_out(task.inputs["data"])]
    if not held_out:
        raise StageError(
            "no questions: no source, and no held-out conversation",
            "at least one",
            "Name `sources: {questions: ...}`, or raise data's eval_share.",
        )
    return held_out


def _with_checks(row: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """A question that holds all that it is judged by. So exchange.json and a served model's check.json do."""
    merged = {**settings, **row["expect"].get("checks", {})}
    return row | {"expect": {**row["expect"], "checks": merged}} if merged else row


def _held_out(data: Path) -> Iterator[dict[str, Any]]:
    """A question for every held-out conversation: the same calls are expected, or about as short a text."""
    for _, row in dataset.read(data / "eval.jsonl"):
        last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        expected = row["messages"][last]
        calls = [
            {key: call["function"][key] for key in ("name", "arguments")}
            for call in expected.get("tool_calls") or []
        ]
        words = len((expected.get("content") or "").split())
        yield {
            "id": row["id"],
            "category": row["category"],
            "messages": row["messages"][:last],
            "tools": row["tools"],
            "expect": {"calls": calls} if calls else {"no_tool": True, "max_words": max(20, 2 * words)},
        }


def production_findings(question_list: list[questions.Question], data: Path) -> list[check.Finding]:
    """How the questions differ from production as stage data wrote it: another system prompt, other tools, or
    no tools although every training row has some.
    """
    prompt, tools = (data / "prompt.txt").read_text(), json.loads((data / "tools.json").read_text())
    findings = questions.prompt_findings(question_list, prompt) + questions.tool_findings(
        question_list, tools
    )
    without_tools = [question for question in question_list if not question.row.get("tools")]
    if without_tools and all(row["tools"] for _, row in dataset.read(data / "train.jsonl")):
        findings.append(
            check.Finding(
                without_tools[0].place,
                f"{len(without_tools)} of {len(question_list)} questions without tools, first"
                f" {without_tools[0].row['id']}; every training conversation has some",
                "questions that are asked as the model was trained",
                "Give them production's tools.",
            )
        )
    return findings


def training_rows(data: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and row of every training conversation."""
    for _, row in dataset.read(data / "train.jsonl"):
        yield f"{row['file']}:{row['line']}", row
