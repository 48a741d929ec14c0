"""Compares the rows with the system prompt and the tools that production sends with every request.

A model that is trained with another prompt or without the tools misbehaves in production.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import unicodedata
from collections import Counter
from typing import Any

from stages import job
from stages.conversations import content
from stages.conversations.rows import Row
from stages.job import StageError


def with_prompt(
    rows: list[Row], prompt: str, missing_policy: str, other_policy: str
) -> tuple[list[Row], dict[str, int]]:
    """The rows with the production prompt, and the numbers of rows that had no prompt or have another one.

    A prompt that differs only in surrounding blanks or line ends counts as production's, and is replaced by
    it. Rows without a prompt get it if `missing_policy` is insert. Raises StageError if rows have no prompt,
    or another one (with a diff), and the policy is refuse.
    """
    result, without, differing = [], [], []
    for row in rows:
        row_prompt = content.with_lf(row.prompt).strip()
        if row_prompt == prompt or not row_prompt:
            after = row.messages[1:] if row.messages[0]["role"] == "system" else row.messages
            if not row_prompt:
                without.append(row)
            row = dataclasses.replace(
                row, messages=[{**_prompt_flags(row), "role": "system", "content": prompt}, *after]
            )
        else:
            differing.append((row_prompt, row))
        result.append(row)
    if without and missing_policy == "refuse":
        raise StageError(
            f"{len(without)} of {len(rows)} rows have no system prompt, first {without[0].place}",
            "the production prompt in every row",
            "Set missing_prompt: insert to put it in front of them.",
        )
    if differing:
        _refuse_or_warn(differing, len(rows), prompt, other_policy)
    return result, {"prompts_inserted": len(without), "other_prompts": len(differing)}


def _prompt_flags(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.messages[0].items() if row.messages[0]["role"] == "system"}


def _refuse_or_warn(differing: list[tuple[str, Row]], total: int, prompt: str, policy: str) -> None:
    kinds = Counter(row_prompt for row_prompt, _ in differing)
    most_common, count = kinds.most_common(1)[0]
    example = next(row for row_prompt, row in differing if row_prompt == most_common)
    diff = "\n".join(
        difflib.unified_diff(
            prompt.split("\n"), most_common.split("\n"), "production", example.place, lineterm="", n=1
        )
    )
    found = (
        f"{len(differing)} of {total} rows with {len(kinds)} other system prompts; "
        f"the most common ({count} rows) differs so:\n{diff}\n{first_difference(prompt, most_common)}"
    )
    if policy == "refuse":
        raise StageError(
            found,
            "the production prompt in every row",
            "Rewrite the rows' system prompt, name the right prompt file, or set other_prompts: allow.",
        )
    job.warning(found, "other_prompts: allow is set; these rows are trained as they are")


def first_difference(production: str, row_prompt: str) -> str:
    """Where two texts differ first, with code points, because some characters look alike or are invisible."""
    position = next(
        (i for i, (a, b) in enumerate(zip(production, row_prompt, strict=False)) if a != b),
        min(len(production), len(row_prompt)),
    )
    line, column = production.count("\n", 0, position) + 1, position - production.rfind("\n", 0, position)
    place = f"first difference at line {line}, column {column}"
    return (
        f"{place}: {_character(production, position)} in production,"
        f" {_character(row_prompt, position)} in the row"
    )


def _character(text: str, position: int) -> str:
    return (
        f"U+{ord(text[position]):04X} {unicodedata.name(text[position], 'control')}"
        if position < len(text)
        else "the end"
    )


def with_tools(rows: list[Row], tools: list[dict[str, Any]], policy: str) -> tuple[list[Row], dict[str, Any]]:
    """The rows with their tools, and counts. A row may have a part of production's tools. A row without tools
    is refused, unless the policy allows it or inserts them.

    Counted are rows that got the tools, rows without, and for each tool that is not production's (by name or
    definition) the rows that have it. Raises StageError if rows have no tools and the policy is refuse.
    """
    if not tools:
        return rows, {
            "tools_inserted": 0,
            "without_tools": sum(not row.tools for row in rows),
            "other_tools": {},
        }
    definitions = {tool["function"]["name"]: json.dumps(tool["function"], sort_keys=True) for tool in tools}
    without = [row for row in rows if not row.tools]
    if without and policy == "refuse":
        raise StageError(
            f"{len(without)} of {len(rows)} rows have no tools, first {without[0].place}; "
            f"production sends {len(tools)} with every request",
            "production's tools, or a part of them, in every row",
            "Set tools: insert to give them production's, or tools: allow to train them without.",
        )
    differing: Counter[str] = Counter()
    for row in rows:
        for tool in row.tools or []:
            name = tool["function"]["name"]
            if definitions.get(name) != json.dumps(tool["function"], sort_keys=True):
                differing[f"{name} ({'another definition' if name in definitions else 'unknown'})"] += 1
    if differing:
        listed = ", ".join(f"{name} in {count} rows" for name, count in differing.most_common(5))
        job.warning(
            f"rows have tools that are not production's: {listed}",
            "they are trained as they are; production will not send these",
        )
    inserted = policy == "insert"
    if inserted:
        rows = [row if row.tools else dataclasses.replace(row, tools=tools) for row in rows]
    return rows, {
        "tools_inserted": len(without) if inserted else 0,
        "without_tools": 0 if inserted else len(without),
        "other_tools": dict(differing),
    }
