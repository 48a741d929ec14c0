"""What can be said of the files of stage data before a base is downloaded: prompt and tools are what they are called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from stages import check
from stages.check import Finding, Given


def look(its: Given) -> list[Finding]:
    findings: list[Finding] = []
    for path in its.sources.get("prompt", []):
        findings += prompt(path)
    for path in its.sources.get("tools", []):
        findings += tools(path)
    for path in its.sources.get("conversations", []):
        findings += conversations(path)
    return findings


def prompt(path: Path) -> Iterator[Finding]:
    text = _text(path)
    if isinstance(text, Finding):
        yield text
    elif not text.strip():
        yield Finding(path.name, "an empty prompt", "the production system prompt", "Write it, or name another file in sources.prompt.")
    elif "\0" in text:
        yield Finding(path.name, "NUL bytes", "the production system prompt as UTF-8 text", "Save it as UTF-8.")


def tools(path: Path) -> Iterator[Finding]:
    text = _text(path)
    if isinstance(text, Finding):
        yield text
        return
    expected, remedy = "a JSON list of tools in OpenAI's form", "Mend the file, or leave sources.tools out where production has no tools."
    if not text.strip():
        yield Finding(path.name, "an empty file", expected, remedy)
        return
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"{path.name}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else path.name
        yield Finding(where, f"no JSON ({getattr(error, 'msg', error)})", expected, remedy)
        return
    if not isinstance(listed, list):
        yield Finding(path.name, f"a JSON {type(listed).__name__}", expected, remedy)
        return
    for number, tool in enumerate(listed, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            yield Finding(path.name, f"tool {number} without a name", expected, remedy)


def conversations(path: Path) -> Iterator[Finding]:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    if not any(file.stat().st_size for file in files):
        yield Finding(path.name, "a folder without a file that holds something" if path.is_dir() else "an empty file", "conversations",
                      "Check sources.conversations of stage data.")


def _text(path: Path) -> str | Finding:
    """The file as text, or what is wrong with it."""
    if path.is_dir():
        return Finding(path.name, "a folder", "one file", "Name the file itself.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return Finding(path.name, f"bytes that are not UTF-8 (at {error.start})", "UTF-8 text", "Save it as UTF-8.")
    except OSError as error:
        return Finding(path.name, error.strerror or str(error), "a file that can be read", "Check its path and permissions.")


if __name__ == "__main__":
    check.main(look)
