"""What stage evaluate wrote: report.json, and the rows of answers.jsonl in words."""

from __future__ import annotations

from typing import Any

from product.rows import text


def passed(report: dict[str, Any]) -> dict[str, int]:
    """Column -> how many of the questions it passed."""
    return {column: round(report["pass"][column] * report["questions"]) for column in report["columns"]}


def said(answer: dict[str, Any]) -> str:
    """What an answer says and calls."""
    return text({"content": answer["answer"], "tool_calls": answer["tool_calls"]})


def faults(answer: dict[str, Any]) -> tuple[str, ...]:
    """What the checks found in an answer."""
    return tuple(f"{fault['mode']}: {fault['detail']}" for fault in answer["failures"])
