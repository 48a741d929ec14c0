"""An evening with own data, as docs/own-data.md and docs/versions.md have it, in make long (20 minutes)."""

from __future__ import annotations

import json
import os
import re

import pytest
from conftest import BUILD, free_port, ran, serving

pytestmark = pytest.mark.skipif(not os.environ.get("ANNIE_TEST_LONG"), reason="not run: make long runs it")
LOCAL = ("--executor", "local")


@pytest.fixture(scope="module")
def evening(tmp_path_factory):
    """A folder in which `mine` was begun and run once."""
    folder = tmp_path_factory.mktemp("evening")
    ran(*BUILD, "init", "mine", folder=folder)
    assert "7 of 7 to run" in ran(*BUILD, "plan", "mine", *LOCAL, folder=folder)
    text = ran(*BUILD, "run", "mine", *LOCAL, folder=folder)
    assert "gate passed" in text and "95 % interval" in text, text
    return folder


def says(folder, *words):
    """What a command says of the recipe."""
    return ran(*BUILD, *words, "--recipe", "mine", *LOCAL, folder=folder)


def test_a_changed_row_is_named_and_undone(evening):
    conversations = evening / "mine" / "conversations" / "yard.jsonl"
    before = conversations.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    answer = next(m for m in rows[1]["messages"] if m["role"] == "assistant")
    answer["content"] = "Ask at the harbour."
    conversations.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert "line 2 changed" in says(evening, "explain", "data")
    conversations.write_text(before)
    assert "nothing to do: 7 stages are built" in ran(*BUILD, "run", "mine", *LOCAL, folder=evening)


def test_runs_of_two_ranks_are_compared_and_the_first_is_served(evening):
    recipe = evening / "mine" / "recipe.yaml"
    before = recipe.read_text()
    recipe.write_text(before.replace("rank: 32  ", "rank: 16  "))
    assert "the parameter rank changed: 32 -> 16" in says(evening, "plan")
    ran(*BUILD, "run", "mine", "--until", "train", *LOCAL, folder=evening)
    then, now = re.findall(r"^(\d{8}-\d{6}\S*)", says(evening, "runs"), re.MULTILINE)[1::-1]
    text = says(evening, "diff", then, now)
    assert "rank: 32 -> 16" in text and "then  " + then in text
    first = says(evening, "path", "quantize", "--run", then).strip()
    port = free_port()
    serve = [*BUILD, "serve", "--recipe", "mine", *LOCAL, "--run", then, "--port", port]
    with serving(*serve, said=f"serving {first}", folder=evening):
        url = f"http://127.0.0.1:{port}"
        said = ran(*BUILD, "chat", "--url", url, "Please name the limit of the crane.", folder=evening)
        assert re.search(r"^mine  \S", said, re.MULTILINE), said
    recipe.write_text(before)
    assert "nothing to do: 7 stages are built" in ran(*BUILD, "run", "mine", *LOCAL, folder=evening)
