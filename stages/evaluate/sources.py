"""Checks of stage evaluate before anything is built: the KV cache, the gate, the questions against
production's prompt and tools, and the checks of behaviour on the answers that are trained.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.families.serve import Served, ServingError, kv_cache
from stages import check, dataset
from stages.check import Finding, PlannedStage
from stages.evaluate import expectations, gate, overlap, questions, training_answers
from stages.evaluate.parameters import Parameters

# Conversations of up to this size are compared here, in a tenth of a second. Stage evaluate compares all of
# them before it starts the first server.
MOST_BYTES = 5_000_000

Row = tuple[str, dict[str, Any]]  # place and content of a conversation

# The version of the image is not known here. This one has no limits of its own, only those of the device.
NEWEST = "0.33"
DTYPES = {"fp8": "FP8", "bfloat16": "BF16", "auto": "the model's own dtype"}


def kv_cache_findings(stage: PlannedStage) -> list[Finding]:
    """A note with the KV cache of the quantised model and the reason for it, or an error if this device does
    not have the one that the recipe asks for.
    """
    if "quantize" not in stage.inputs:
        return []
    checkpoint = Served("nvidia", fp8_cache=stage.inputs["quantize"].params["kv_cache"] == "FP8")
    try:
        chosen = kv_cache(NEWEST, stage.device, checkpoint, stage.parameters(Parameters).kv_cache)
    except ServingError as error:
        return [
            Finding(
                f"{stage.stage}.kv_cache",
                error.found,
                "a KV cache that this machine serves",
                f"In the recipe, {error.remedy}.",
            )
        ]
    return [
        Finding(
            f"{stage.stage}.kv_cache",
            f"{DTYPES[chosen.dtype]} for the quantised model, since {chosen.why}",
            level="note",
        )
    ]


def check_sources(stage: PlannedStage) -> list[Finding]:
    """Findings about the KV cache, the gate, the questions and the checks of stage evaluate."""
    data = stage.inputs["data"].sources if "data" in stage.inputs else {}
    rows = list(_conversations(data.get("conversations", [])))
    return [
        *kv_cache_findings(stage),
        *gate_and_question_findings(stage, rows),
        *training_answer_findings(rows, _production_tools(data.get("tools")), stage),
    ]


def training_answer_findings(
    rows: list[Row], tools: list[dict[str, Any]] | None, stage: PlannedStage
) -> list[Finding]:
    """Warnings about training answers that fail the recipe's checks. A row without tools counts as one with
    production's.
    """
    with_tools = ((place, {**row, "tools": row.get("tools") or tools}) for place, row in rows)
    return training_answers.findings(
        training_answers.trained(with_tools), stage.parameters(Parameters).checks
    )


def gate_and_question_findings(stage: PlannedStage, training: list[Row]) -> list[Finding]:
    """What is wrong with the gate and the questions."""
    findings = [
        Finding(
            "evaluate.gate",
            fault,
            "a gate that can be held",
            "docs/formats.md, The gate, says what one holds.",
        )
        for fault in gate.faults(stage.parameters(Parameters).gate)
    ]
    if not stage.sources.get("questions"):
        if "data" in stage.inputs and stage.inputs["data"].params.get("eval_share") == 0:
            findings.append(
                Finding(
                    "evaluate.sources",
                    "no questions, and data.eval_share = 0: none can be made unless a source has a held-out"
                    " split of its own",
                    "at least one question",
                    "Name `sources: {questions: ...}` in stage evaluate, or set eval_share above 0.",
                    "warning",
                )
            )
        return findings
    question_list, question_findings = questions.read(stage.sources["questions"][0])
    data = stage.inputs["data"].sources if "data" in stage.inputs else {}
    # Stage data reports a prompt or tools file that cannot be read.
    if prompt := _file_text(data.get("prompt")):
        question_findings += questions.prompt_findings(question_list, prompt)
    if "prompt" in data and (tools := _production_tools(data.get("tools"))) is not None:
        question_findings += questions.tool_findings(question_list, tools)
    return [
        *findings,
        *question_findings,
        *unjudged_findings(question_list, stage.parameters(Parameters).checks),
        *overlap.findings(question_list, ((place, row["messages"]) for place, row in training)),
    ]


def unjudged_findings(question_list: list[questions.Question], settings: dict[str, Any]) -> list[Finding]:
    """A warning for every check that is off while questions expect something that it alone judges."""
    unjudged: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for question in question_list:
        expect = question.row["expect"]
        for name, mode in expectations.JUDGE.items():
            if expect.get(name) and {**settings, **expect.get("checks", {})}.get(mode) is False:
                unjudged[mode].append((question.place, name))
    return [
        Finding(
            f"evaluate.checks.{mode}",
            f"it off, and {len({place for place, _ in found})} questions that expect"
            f" {' or '.join(dict.fromkeys(name for _, name in found))}, the first at {found[0][0]}",
            "expectations that are judged",
            "Switch the check on, or remove them from the questions.",
            "warning",
        )
        for mode, found in unjudged.items()
    ]


def _file_text(paths: list[Path] | None) -> str:
    try:
        return paths[0].read_text(encoding="utf-8-sig") if paths else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _production_tools(paths: list[Path] | None) -> list[dict[str, Any]] | None:
    """The production tools. An empty list if the recipe names no tools file; None if the file is not a list
    of tools.
    """
    if not paths:
        return []
    try:
        tools = json.loads(_file_text(paths))
    except ValueError:
        return None
    return tools if isinstance(tools, list) else None


def _conversations(sources: list[Path]) -> Iterator[Row]:
    """The rows in JSON Lines files. Stage evaluate compares rows of other formats
    later.
    """
    files = [
        (path, source)
        for source in sources
        for path in (sorted(source.rglob("*.jsonl")) if source.is_dir() else [source])
    ]
    if sum(path.stat().st_size for path, _ in files) > MOST_BYTES:
        return
    for path, source in files:
        with path.open("rb") as opened:
            for number, raw in dataset.lines(opened):
                try:
                    row = dataset.parse(raw)
                except ValueError:
                    continue
                messages = row.get("messages") if isinstance(row, dict) else None
                if isinstance(messages, list) and all(_is_message(m) for m in messages):
                    yield f"{path.relative_to(source.parent)}:{number}", row


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), (str, type(None)))
    )


if __name__ == "__main__":
    check.main(check_sources)
