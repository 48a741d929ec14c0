"""Reads the questions of an evaluation and checks every field before any is asked (docs/formats.md,
Questions).

This module uses the standard library alone, because it also runs on the host before the first stage
(stages/evaluate/sources.py).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.families.messages import ChatError, normalise, served_tools
from stages import dataset
from stages.check import Finding
from stages.evaluate import expectations
from stages.evaluate.expectations import is_text, unknown_keys

FIELDS = ("id", "category", "messages", "tools", "expect")
OPTIONAL = ("tools", "public")
ROLES = ("system", "user", "assistant", "tool")
REMEDY = "docs/formats.md, Questions, says what a question holds."


@dataclass(frozen=True)
class Question:
    """One question; `place` is its file and line."""

    place: str
    row: dict[str, Any]

    @property
    def prompt(self) -> str:
        """The system prompt, or ""."""
        first = self.row["messages"][0]
        return first["content"] if first["role"] == "system" else ""


def read(path: Path) -> tuple[list[Question], list[Finding]]:
    """The valid questions of a JSON Lines file, and findings about the others."""
    questions: list[Question] = []
    findings: list[Finding] = []
    places: dict[str, str] = {}
    if not path.is_file():
        return [], [
            Finding(
                path.name,
                "no file",
                "a JSON Lines file with a question on every line",
                "Check `sources: {questions: ...}` of stage evaluate.",
            )
        ]
    with path.open("rb") as opened:
        for number, raw in dataset.lines(opened):
            place = f"{path.name}:{number}"
            try:
                row = dataset.parse(raw)
            except ValueError as error:
                findings.append(Finding(place, str(error), "a question as one JSON object", REMEDY))
                continue
            row_findings = [
                Finding(place, found, expected, REMEDY) for found, expected in faults(row)
            ] or template_findings(place, row)
            if not row_findings and row["id"] in places:
                row_findings = [
                    Finding(
                        place,
                        f"the id {row['id']} a second time",
                        f"each id once (the first is {places[row['id']]})",
                        "Rename one of the two.",
                    )
                ]
            findings += row_findings
            if not row_findings:
                places[row["id"]] = place
                questions.append(Question(place, row))
    if not questions and not findings:
        findings.append(Finding(path.name, "no question", "at least one", REMEDY))
    return questions, findings


def template_findings(place: str, row: dict[str, Any]) -> list[Finding]:
    """A finding if the chat template could not render the question. A question is rendered in the same form
    as a training row.
    """
    try:
        normalise(row["messages"])
        served_tools(row.get("tools"))
    except ChatError as error:
        return [Finding(place, str(error), "a conversation that a server can render", REMEDY)]
    return []


def faults(row: Any) -> Iterator[tuple[str, str]]:
    """(found, expected) for everything that is wrong with one question."""
    if not isinstance(row, dict):
        yield f"a JSON {type(row).__name__}", "a question as one JSON object"
        return
    yield from unknown_keys(row, (*FIELDS, "public"), "a question")
    if missing := [name for name in FIELDS if name not in row and name not in OPTIONAL]:
        yield f"no {', '.join(missing)}", f"a question with {', '.join(FIELDS)}"
        return
    for name in ("id", "category"):
        if not is_text(row[name]):
            yield f"{name} = {row[name]!r}", "a text that is not empty"
    if not isinstance(row.get("public", False), bool):
        yield f"public = {row['public']!r}", "true (it may be in the serving image) or false"
    yield from _message_faults(row["messages"])
    names: list[str] = []
    tools = row.get("tools", [])
    if not isinstance(tools, list):
        yield f"tools as a JSON {type(tools).__name__}", "a list of tools"
    else:
        for number, tool in enumerate(tools, 1):
            tool_name = function(tool).get("name")
            if not isinstance(tool_name, str) or not is_text(tool_name):
                yield f"tool {number} without a name", "a function with a name, in OpenAI's form"
            elif tool_name in names:
                yield f"the tool {tool_name} twice", "each tool once"
            else:
                names.append(tool_name)
    yield from expectations.faults(row["expect"], names)


def _message_faults(messages: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(messages, list) or not messages:
        yield "messages that are no list or an empty one", "the conversation up to the answer"
        return
    for position, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            yield (
                f"message {position} with the role {role!r}",
                f"an object with one of the roles {', '.join(ROLES)}",
            )
            return
        if role == "system" and position > 1:
            yield f"message {position} as a second system prompt", "at most one, at the start"
        calls = message.get("tool_calls")
        if not isinstance(message.get("content"), str) and not (
            message.get("content") is None and role == "assistant" and calls
        ):
            yield f"message {position} without text", "content as a text"
            return
        if calls and (role != "assistant" or not _are_calls(calls)):
            yield f"tool_calls of message {position}", "an assistant's list of {function: {name, arguments}}"
    if messages[-1]["role"] not in ("user", "tool"):
        yield f"a last message of {messages[-1]['role']}", "one of user or tool, which the model is to answer"
    if not any(message["role"] == "user" for message in messages):
        yield "no message of user", "at least one"


def _are_calls(calls: Any) -> bool:
    return isinstance(calls, list) and all(
        isinstance(call, dict)
        and isinstance(call.get("function"), dict)
        and is_text(call["function"].get("name"))
        and isinstance(call["function"].get("arguments"), (dict, str))
        for call in calls
    )


# --- production's prompt and tools --------------------------------------------------------------------------


def function(tool: Any) -> dict[str, Any]:
    """The function of a tool, in OpenAI's form or bare; empty if the tool is neither."""
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    return inner if isinstance(inner, dict) else {}


def signature(tool: dict[str, Any]) -> str:
    """What the model sees of a tool (name, description and parameters) as text. A missing description counts
    as an empty one.
    """
    inner = function(tool)
    return json.dumps(
        [inner.get("name"), inner.get("description") or "", inner.get("parameters") or {}], sort_keys=True
    )


def normal_prompt(prompt: str) -> str:
    """A prompt in the form in which stage data trains it: LF at line ends, no surrounding blanks."""
    return prompt.replace("\r\n", "\n").replace("\r", "\n").strip()


def prompt_findings(questions: list[Question], prompt: str) -> list[Finding]:
    """One finding if any question has another system prompt than production. It shows the difference of the
    first such question.
    """
    differing = [
        question for question in questions if normal_prompt(question.prompt) != normal_prompt(prompt)
    ]
    if not differing:
        return []
    first = differing[0]
    diff = "\n".join(
        difflib.unified_diff(
            normal_prompt(prompt).split("\n"),
            normal_prompt(first.prompt).split("\n"),
            "production",
            first.place,
            lineterm="",
            n=1,
        )
    )
    differs = (
        f"that of {first.row['id']} differs so:\n{diff}" if first.prompt else f"{first.row['id']} has none"
    )
    return [
        Finding(
            first.place,
            f"{len(differing)} of {len(questions)} questions with another system prompt; {differs}",
            "the production prompt in every question",
            "Rewrite the questions' system prompt, or name the right prompt file in stage data.",
        )
    ]


def tool_findings(questions: list[Question], production: list[dict[str, Any]]) -> list[Finding]:
    """A finding for every question with a tool that production does not have or defines differently."""
    definitions: dict[str, str] = {
        function(tool)["name"]: signature(tool) for tool in production if "name" in function(tool)
    }
    findings = []
    for question in questions:
        tools = {function(tool)["name"]: signature(tool) for tool in question.row.get("tools", [])}
        unknown = [name for name in tools if name not in definitions]
        changed = [name for name, text in tools.items() if name in definitions and definitions[name] != text]
        differences = [f"tools that production does not have: {', '.join(unknown)}"] * bool(unknown) + [
            f"tools defined otherwise than in production: {', '.join(changed)}"
        ] * bool(changed)
        if differences:
            findings.append(
                Finding(
                    question.place,
                    f"question {question.row['id']} with {'; '.join(differences)}",
                    f"tools of {', '.join(definitions) or 'a recipe that names none'}",
                    "Take the definition of stage data's tools file, or name the right one there.",
                )
            )
    return findings
