"""build.py init: a folder that runs as it is."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import build
from forge import check, plan, recipe
from forge.store import Store


@pytest.fixture
def init(tmp_path, monkeypatch):
    """`init(*words, code=0)` runs it in a folder of its own; its output on one line."""
    monkeypatch.chdir(tmp_path)

    def call(*words, code=0):
        result = CliRunner().invoke(build.cli, ["init", *words])
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    return call


@pytest.mark.parametrize("kind", ["tiny", "annie"])
def test_what_is_written_passes_every_check_before_a_run(init, tmp_path, kind):
    assert "build.py plan" in init("signe", "--from", kind)
    read = recipe.load(recipe.find("signe", build.REPO), build.REPO)
    context = plan.Context(read, Store(tmp_path / "home"), build.REPO, "local")
    levels = {finding.level for finding in check.findings(context, plan.make(context))}
    assert read.name == "signe" and levels <= {"note"}


def test_the_questions_are_in_no_conversation(init, tmp_path):
    init("signe")
    folder = tmp_path / "signe"
    talks = [json.loads(line) for file in folder.glob("conversations/*") for line in file.open()]
    asked = [json.loads(line) for line in (folder / "questions.jsonl").open()]
    texts = {talk["messages"][0]["content"] for talk in talks}
    assert len(talks) == 60 and len(asked) == 10
    assert not texts & {question["messages"][-1]["content"] for question in asked}
    assert asked[0]["messages"][0]["content"] == (folder / "prompt.txt").read_text().strip()
    assert (folder / "prompt.txt").read_text().startswith("You are signe,")
    assert {"conversations/", "prompt.txt"} <= set((folder / ".gitignore").read_text().splitlines())


def test_a_folder_that_is_there_stays_as_it_is(init, tmp_path):
    (tmp_path / "signe").mkdir()
    assert "signe, which is there already" in init("signe", code=1)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "which is there already" in init("link", code=1)
    assert not list((tmp_path / "signe").iterdir())


@pytest.mark.parametrize("name", ["my signe", "a/b", "..", ".hidden", "", "tiny"])
def test_a_name_that_cannot_be_a_recipes_is_refused(init, tmp_path, name):
    assert "Take another name." in init(name, code=1)
    assert not list(tmp_path.iterdir())
