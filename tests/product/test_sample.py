"""The sample data set: made by its script, wide enough to learn from, and without a word of what it will
be asked.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample"
CATEGORIES = [
    "topic_switch",
    "direct_action",
    "concise_voice",
    "honest_memory",
    "rajesh_context",
    "kannada_culture",
    "mixed_multiturn",
    "no_emoji_no_markdown",
    "tool_result_responses",
    "no_followup_questions",
]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(row):
    """What the user says, turn by turn, in the letters that a comparison should look at."""
    return [" ".join(m["content"].lower().split()) for m in row["messages"] if m["role"] == "user"]


def test_the_files_are_what_the_script_writes():
    done = subprocess.run([sys.executable, SAMPLE / "generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_category_has_thirty_conversations_under_the_production_prompt(category):
    found = rows(SAMPLE / "conversations" / f"{category}.jsonl")
    assert len(found) >= 30 and {row["category"] for row in found} == {category}
    prompt = (SAMPLE / "system_prompt.txt").read_text().strip()
    assert {row["messages"][0]["content"] for row in found} == {prompt}


def test_every_category_is_asked_about():
    assert {question["category"] for question in rows(SAMPLE / "questions.jsonl")} == set(CATEGORIES)


def test_no_held_out_question_was_ever_heard():
    heard = {
        text
        for path in [*SAMPLE.glob("conversations/*.jsonl"), SAMPLE / "lessons.jsonl"]
        for row in rows(path)
        for text in asked(row)
    }
    last = {question["id"]: asked(question)[-1] for question in rows(SAMPLE / "questions.jsonl")}
    assert {id_: text for id_, text in last.items() if any(text in other for other in heard)} == {}


def test_the_prompt_has_its_rules():
    text = (SAMPLE / "system_prompt.txt").read_text()
    rules = text.partition("<rules>")[2].partition("</rules>")[0].strip().splitlines()
    assert "</rules>" in text and len(rules) >= 3
