"""Answers that are kept until all servers were asked."""

from __future__ import annotations

import json

import pytest

from stages.evaluate import columns
from stages.evaluate.columns import Columns

BOTH = ("base", "tuned")


def answered():
    answers = {column: [{"content": f"{column} {n}", "tool_calls": []} for n in range(3)] for column in BOTH}
    return Columns(answers, dict.fromkeys(BOTH, 1.5), dict.fromkeys(BOTH, 0))


def test_what_was_answered_is_read_again_and_nothing_else(tmp_path, capsys):
    assert columns.load(tmp_path, BOTH, 3) is None
    answered().save(tmp_path)
    assert columns.load(tmp_path, BOTH, 3) == answered()
    assert columns.load(tmp_path, ("merged",), 3) is None
    assert [path.name for path in tmp_path.iterdir()] == ["answers-base-tuned.json"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"answers": {"base": []}}', '{"other": 1}'])
def test_a_damaged_file_is_named_and_asked_again(tmp_path, monkeypatch, content):
    warnings = []
    monkeypatch.setattr(columns.job, "warning", lambda *said: warnings.append(said))
    answered().save(tmp_path)
    (tmp_path / "answers-base-tuned.json").write_text(content)
    assert columns.load(tmp_path, BOTH, 3) is None
    assert "answers-base-tuned.json" in warnings[0][0] and "damaged" in warnings[0][0]


def test_fewer_answers_than_questions_are_no_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(columns.job, "warning", lambda *said: None)
    fewer = answered()
    fewer.answers["tuned"].pop()
    fewer.save(tmp_path)
    assert columns.load(tmp_path, BOTH, 3) is None


def test_an_interrupted_save_leaves_no_file_of_that_name(tmp_path, monkeypatch):
    def cut(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(columns.Path, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        answered().save(tmp_path)
    assert columns.load(tmp_path, BOTH, 3) is None
    assert json.loads((tmp_path / "answers-base-tuned.begun").read_text())["seconds"]["base"] == 1.5
