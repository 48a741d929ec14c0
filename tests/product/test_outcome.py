"""What a run made: shares with intervals, failed questions, held-out loss and the verdict."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from forge.finding import Refused
from product import outcome, report

FAULT = [{"mode": "markdown", "detail": "**"}]
GATE = {"passed": True, "why": [], "unchecked": False}


def folder(tmp_path, passed, questions=50, answers=()):
    columns = list(passed)
    described = {"columns": columns, "questions": questions, "pass": passed, "gate": GATE}
    (tmp_path / "report.json").write_text(json.dumps(described))
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return tmp_path


def answer(name, column, failures=(), said="Tokyo.", calls=()):
    return {
        "id": name,
        "column": column,
        "question": f"What is\n{name}?",
        "answer": said,
        "tool_calls": list(calls),
        "failures": list(failures),
    }


def shown(made, width=80, most=5):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(report.of_outcome(made, most), highlight=False)
    return console.export_text()


@pytest.mark.parametrize(
    ("passed", "questions", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: Wilson's score interval.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(passed, questions, low, high):
    assert outcome.Share("base", passed, questions).interval == pytest.approx((low, high), abs=5e-5)


def test_four_bits_that_lose_more_than_two_points_or_one_question_are_named(tmp_path):
    whole = {"base": 0.0, "tuned": 1.0, "merged": 1.0}
    kept = folder(tmp_path, {**whole, "nvfp4": 0.98})  # one of 50
    assert outcome.of_folder(kept).verdict == ""
    few = outcome.of_folder(folder(tmp_path, {**whole, "nvfp4": 0.9}, questions=10))  # one of 10
    assert few.verdict == ""
    lost = outcome.of_folder(folder(tmp_path, {**whole, "nvfp4": 0.94})).verdict
    assert lost.startswith("Lost in four bits: NVFP4 passes 94%, BF16 100%.") and "qat_share" in lost
    # Where tuned was not asked, merged stands for it.
    untuned = {"base": 0.0, "merged": 1.0, "nvfp4": 0.5}
    assert outcome.of_folder(folder(tmp_path, untuned)).verdict.startswith("Lost in four bits")
    merge = outcome.of_folder(folder(tmp_path, {"base": 0.0, "tuned": 1.0, "merged": 0.5, "nvfp4": 0.5}))
    assert merge.verdict.startswith("Lost in the merge: merged passes 50%, tuned 100%.")


def test_the_trainings_verdict_stands_where_nothing_was_lost_since(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    training = {"verdict": {"says": "Overfitted: fewer epochs."}, "kept_step": 90, "steps": 200}
    training["loss"] = {"held_out": 1.214, "held_out_last": 1.48, "held_out_base": 2.5}
    (adapter / "training.json").write_text(json.dumps(training))
    made = outcome.of_folder(folder(tmp_path, {"base": 0.0, "merged": 1.0, "nvfp4": 1.0}), adapter)
    text = shown(made)
    assert text.endswith("\nOverfitted: fewer epochs.\n")
    assert "\nheld-out loss: 2.5 before, 1.21 at step 90 (kept), 1.48 at step 200\n" in text


def test_a_last_step_that_is_kept_is_named_once(tmp_path):
    made = outcome.of_folder(folder(tmp_path, {"base": 0.0, "merged": 1.0, "nvfp4": 1.0}))
    training = {"kept_step": 200, "steps": 200, "loss": {"held_out": 1.214, "held_out_last": 1.214}}
    assert "held-out loss: 1.21 at step 200 (kept)\n" in shown(replace(made, training=training))


def test_failed_questions_say_who_failed_them_and_how(tmp_path):
    call = {"function": {"name": "set_timer", "arguments": '{"minutes": 40}'}}
    answers = [
        answer("a", "base", FAULT),  # what the base fails is what training is there for
        answer("a", "nvfp4"),
        answer("b", "tuned", FAULT, "**Tokyo**\nis it" * 20),
        answer("b", "nvfp4", FAULT, "**Kyoto**\nis it" * 20),
        *(answer(f"c{n}", "nvfp4", FAULT, None, [call]) for n in range(6)),
    ]
    made = outcome.of_folder(folder(tmp_path, {"base": 0.0, "nvfp4": 0.86}, answers=answers))
    assert [failed.id for failed in made.failed] == ["b", *(f"c{n}" for n in range(6))]
    lines = shown(made, width=60).splitlines()
    start = lines.index("7 questions failed")
    assert lines[start + 1 : start + 5] == [
        "  b, failed by tuned, nvfp4",
        "    asked   What is b?",
        "    answer  **Kyoto** is it**Kyoto** is it**Kyoto** is it**…",
        "    fault   markdown: **",
    ]
    assert '    answer  set_timer({"minutes": 40})' in lines
    assert "  and 2 more: python build.py report --all" in lines
    assert "more" not in shown(made, most=7)
    assert max(map(len, lines)) <= 60


def test_a_report_that_was_edited_is_refused(tmp_path):
    made = folder(tmp_path, {"base": 0.0, "nvfp4": 1.0})
    for damaged in ("{", "[]", '{"columns": ["base"]}'):
        (made / "report.json").write_text(damaged)
        with pytest.raises(Refused, match="a report that cannot be read"):
            outcome.of_folder(made)
