"""The folder that `build.py init` writes: a recipe that runs as it is, with an invented assistant's data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from forge import modes, recipe
from forge.finding import Refused, error

_FOLDER = Path(__file__).parent / "starter"
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,
)


def write(name: str, kind: str, repo: Path, parent: Path) -> Path:
    """Writes the folder `name` into `parent`, for the model of the recipe `kind` (tiny, annie). Refused if it
    is there, or if the name cannot be a recipe's.
    """
    folder = parent / name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        expected = "letters, digits, dots and dashes, since it names the folder and the model"
        raise Refused(error("init", f"the name {name!r}", expected, "Take another name."))
    if (repo / "recipes" / f"{name}.yaml").exists():
        raise Refused(
            error("init", f"recipes/{name}.yaml", "a name that is not in recipes/", "Take another name.")
        )
    if folder.exists() or folder.is_symlink():
        raise Refused(
            error("init", f"{folder}, which is there already", "a new folder", "Take another name.")
        )
    modes.make_folder(folder / "conversations")
    for file, text in _files(name, kind).items():
        modes.write(folder / file, text)
    return folder / recipe.FILE


def _files(name: str, kind: str) -> dict[str, str]:
    topics = json.loads((_FOLDER / "topics.json").read_text())
    prompt, tools = _rendered("prompt.txt.j2", name), (_FOLDER / "tools.json").read_text()
    return {
        recipe.FILE: _rendered(f"{kind}.yaml.j2", name),
        ".gitignore": _rendered("gitignore.j2", name),
        "prompt.txt": prompt,
        "tools.json": tools,
        "questions.jsonl": _lines(_questions(topics, prompt.strip(), json.loads(tools))),
        **{f"conversations/{category}.jsonl": _lines(_rows(topics, category)) for category in topics["asks"]},
    }


def _rendered(template: str, name: str) -> str:
    return _TEMPLATES.get_template(template).render(name=name)


def _lines(rows: Iterator[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _rows(topics: dict[str, Any], category: str) -> Iterator[dict[str, Any]]:
    """Every topic of a category in all wordings but the last, which the questions have."""
    for topic in topics[category]:
        for ask in topics["asks"][category][:-1]:
            messages = [{"role": "user", "content": ask.format(topic["what"])}, _answer(topic)]
            yield {"messages": messages, "category": category}


def _answer(topic: dict[str, Any]) -> dict[str, Any]:
    if "answer" in topic:
        return {"role": "assistant", "content": topic["answer"]}
    function = {"name": topic["tool"], "arguments": json.dumps(topic["arguments"])}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _questions(topics: dict[str, Any], prompt: str, tools: list[Any]) -> Iterator[dict[str, Any]]:
    for category, asks in topics["asks"].items():
        for number, topic in enumerate(topics[category], 1):
            messages = [
                {"role": "system", "content": prompt},
                {"role": "user", "content": asks[-1].format(topic["what"])},
            ]
            if "answer" in topic:
                expect = {"no_tool": True, "max_words": 20, "must_say": topic["must_say"]}
            else:
                expect = {"tool": {"name": topic["tool"], "arguments": topic["arguments"]}}
            yield {
                "id": f"{category}-{number}",
                "category": category,
                "messages": messages,
                "tools": tools,
                "expect": expect,
                "public": True,
            }
