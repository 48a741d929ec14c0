"""What `build.py diff` says of two runs, and that an artifact of an earlier run can be had again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import toy

from forge import history, journal
from forge.store import Store
from product import difference, difference_shown, rows

PROMPT = {"role": "system", "content": "You are Signe."}


def row(number, user, answer, file="talks/a.jsonl", line=None, prompt=PROMPT, tools=()):
    messages = [prompt, {"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    place = {"id": f"{number:016x}", "category": "a", "file": file, "line": line or number}
    return {**place, "messages": messages, "tools": list(tools), "input_ids": [1], "labels": [1]}


@pytest.fixture
def compared(tmp_path):
    """`compared(then, now)`: each a list of rows to train on, or that and a list of held-out rows."""

    def call(*sides):
        for name, side in zip(("then", "now"), sides, strict=True):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            train, held_out = side if isinstance(side, tuple) else (side, [])
            for file, listed in (("train.jsonl", train), ("eval.jsonl", held_out)):
                (folder / file).write_text("".join(json.dumps(each) + "\n" for each in listed))
        return rows.differences(tmp_path / "then", tmp_path / "now")

    return call


SAME = [row(n, f"Question number {n} of many", f"Answer {n}.") for n in range(1, 6)]


def test_a_changed_row_is_told_by_its_place_and_first_other_message(compared):
    now = [*SAME[:2], row(30, "Question number 3 of many", "Another answer.", line=3), *SAME[3:]]
    told = compared(SAME, now)
    assert told.same == 4 and not told.added and not told.removed
    assert told.changed == (
        rows.ChangedRow("talks/a.jsonl", 3, 3, "assistant", "Answer 3.", "Another answer."),
    )


def test_rows_that_moved_in_the_file_are_the_same_and_a_changed_one_is_found_at_its_new_line(compared):
    first = row(40, "What does a mooring cost", "Ten crowns.", line=1)
    moved = [{**each, "line": each["line"] + 1} for each in SAME[:4]]
    changed = row(50, "Question number 5 of many", "Answer five.", line=6)
    told = compared(SAME, [first, *moved, changed])
    assert told.same == 4 and [each.line for each in told.added] == [1]
    assert [(each.line, each.line_then) for each in told.changed] == [(6, 5)]
    assert told.added[0].text == "user: What does a mooring cost"


def test_another_row_at_the_same_line_is_a_changed_one(compared):
    told = compared(SAME, [row(60, "Wholly different", "Words.", line=1), *SAME[1:]])
    assert [(each.line, each.what) for each in told.changed] == [(1, "user")]


def test_added_removed_and_moved_to_the_held_out_rows(compared):
    told = compared((SAME, []), (SAME[1:4], SAME[4:]))
    assert told.same == 4 and told.moved == 1
    assert [each.line for each in told.removed] == [1] and not told.changed


def test_other_tools_and_an_added_message(compared):
    tool = {"type": "function", "function": {"name": "check_stock", "parameters": {}}}
    told = compared(SAME[:2], [{**SAME[0], "id": "aa", "tools": [tool]}, SAME[1]])
    assert [(each.what, each.now) for each in told.changed] == [("tools", "check_stock")]
    longer = {**SAME[0], "id": "ab", "messages": [*SAME[0]["messages"], {"role": "user", "content": "Why?"}]}
    told = compared(SAME[:2], [longer, SAME[1]])
    assert [(each.what, each.then, each.now) for each in told.changed] == [("user", "", "Why?")]


def test_another_prompt_is_one_change_of_all_rows(compared):
    prompt = {"role": "system", "content": "You are Signe of the boat yard."}
    now = [row(100 + n, f"Question number {n} of many", f"Answer {n}.", "talks/a.jsonl", n, prompt)
           for n in range(1, 6)]  # fmt: skip
    told = compared(SAME, now)
    assert len(told.changed) == 5 and {each.what for each in told.changed} == {"system"}
    assert [len(group) for group in difference_shown._alike(told.changed)] == [5]


def test_of_many_rows_all_are_counted_and_the_first_are_compared(compared, monkeypatch):
    monkeypatch.setattr(rows, "KEPT", 2)
    monkeypatch.setattr(rows, "MOST_PAIRS", 3)  # so these are compared by line alone
    now = [row(70 + n, f"Question number {n} of many", "Other.", line=n) for n in range(1, 6)]
    told = compared(SAME, now)
    assert told.same == 0 and told.uncompared == 6 and [each.line for each in told.changed] == [1, 2]


EVALUATE = """\
import json
from stages import job

def run(task):
    word = (task.inputs["words"] / "text.txt").read_text()
    for name in ("report.md", "behaviour.png", "exchange.json"):
        (task.output / name).write_text("x")
    shouts = [{"mode": "shout", "detail": word}] if word.isupper() else []
    answers = [{"id": f"q{n}", "column": "nvfp4", "question": "Say it.", "answer": word if n else "yes",
                "tool_calls": [], "failures": shouts if n else []} for n in range(2)]
    (task.output / "answers.jsonl").write_text("".join(json.dumps(a) + chr(10) for a in answers))
    said = {"columns": ["nvfp4"], "questions": 2, "pass": {"nvfp4": 0.5 if shouts else 1.0},
            "gate": {"passed": True, "why": [], "unchecked": False}}
    (task.output / "report.json").write_text(json.dumps(said))

if __name__ == "__main__":
    job.main(run)
"""


@pytest.fixture
def asking(mini):
    """The miniature repository, whose stage count is an evaluate that fails what is shouted."""
    (mini.repo / "stages/count").rename(mini.repo / "stages/evaluate")
    (mini.repo / "stages/evaluate/__main__.py").write_text(EVALUATE)
    toy.edit(mini.repo / "stages/evaluate/stage.toml", 'produces = "text"', 'produces = "report"')
    toy.edit(mini.repo / "stages/slow/stage.toml", 'count = "text"', 'count = "report"')
    toy.edit(
        mini.recipe,
        "  count: {}\n  slow:\n",
        "  evaluate: {}\n  slow:\n    inputs: {count: evaluate}\n",
    )
    return mini


def test_diff_tells_parameters_lines_figures_and_answers(asking, command):
    command("run", "--until", "evaluate")
    toy.edit(asking.recipe, "upper: false", "upper: true")
    toy.edit(asking.repo / "data/a.txt", "beta\n", "beta\ndelta\n")
    toy.edit(asking.repo / "model/letters.py", "UPPER", "# why\nUPPER")
    command("run", "--until", "evaluate")
    first, second = (journal.stamp(folder) for folder in reversed(journal.runs(asking.home, "toy")))
    text = command("diff")
    for words in (
        f"then  {first}, just now, done\nnow   {second}, just now, done\n",
        "words     changed   upper: false -> true",
        "a.txt: line 2 added",
        "code: model/letters.py",
        "evaluate  changed   other inputs",
        "passed, nvfp4  2 of 2  1 of 2",
        "answers: 1 of 2 questions answered otherwise",
        "q1  passed -> failed, nvfp4",
        "then    alpha beta gamma\n    now     ALPHA BETA DELTA GAMMA\n    fault   shout: ALPHA",
        f"not compared: rows: data of {first} is not in that run",
        "serve --recipe toy --run RUN",
    ):
        assert words in re.sub(" +\n", "\n", text), words
    backward = json.loads(command("diff", second, first, "--json"))
    assert backward["answers"]["differ"][0]["change"] == "failed -> passed"
    assert [stage["state"] for stage in backward["stages"]] == ["other", "other"]
    assert backward["figures"][0]["then"] == 1.0


def test_diff_says_what_was_removed_and_what_a_run_never_reached(asking, command):
    command("run")
    toy.edit(asking.recipe, "upper: false", "upper: true")
    command("run", "--until", "evaluate")
    newest = next(history.of_recipe(Store(asking.home), "toy"))
    shutil.rmtree(Store(asking.home).at("evaluate", newest.keys["evaluate"]).folder)
    text = command("diff")
    assert re.search("evaluate +removed since", text) and re.search("slow +then only", text)
    assert f"passed questions and answers: evaluate of {newest.stamp} was removed since" in text
    assert "answered otherwise" not in text


def test_diff_of_a_file_that_was_edited_names_its_folder(asking, command):
    command("run", "--until", "evaluate")
    toy.edit(asking.recipe, "upper: false", "upper: true")
    command("run", "--until", "evaluate")
    newest = next(history.of_recipe(Store(asking.home), "toy"))
    report = Store(asking.home).at("evaluate", newest.keys["evaluate"]).folder / "report.json"
    report.chmod(0o600)
    report.write_text("[]")
    said = command("diff", code=1).replace("\n", "")
    assert str(report.parent) in said and "build.py verify" in said


def test_a_run_is_named_by_as_much_of_its_stamp_as_no_other_has(mini, command):
    assert "found no runs of recipe toy; expected two" in command("diff", code=1)
    command("run")
    assert "found 1 run of recipe toy" in command("diff", code=1)
    toy.edit(mini.recipe, "steps: 3", "steps: 4")
    command("run")
    newest, first = (journal.stamp(folder) for folder in journal.runs(mini.home, "toy"))
    assert "steps: 3 -> 4" in command("diff", first)
    for stamp in ("1999", ""):
        said = command("path", "slow", "--run", stamp or "2", code=1)
        assert f"found {'no' if stamp else '2'} runs" in said and newest in said


def test_path_of_a_run_is_what_it_made_or_used(mini, command):
    command("run")
    before = command("path", "words")
    toy.edit(mini.recipe, "upper: false", "upper: true")
    command("run", "--until", "words")
    newest, first = (journal.stamp(folder) for folder in journal.runs(mini.home, "toy"))
    assert command("path", "words", "--run", first) == before != command("path", "words", "--run", newest)
    assert "slow of run" in command("path", "slow", "--run", newest, code=1)
    toy.edit(mini.recipe, "steps: 3", "steps: 4")
    toy.edit(mini.recipe, "upper: true", "upper: false")
    command("run", "--only", "slow")  # words is not selected: it is found as what slow was made from
    last = journal.stamp(journal.runs(mini.home, "toy")[0])
    assert command("path", "words", "--run", last) == before
    shutil.rmtree(before.strip())
    assert "was removed since" in command("path", "words", "--run", first, code=1)


def test_a_run_that_failed_has_only_what_it_made(mini):
    assert mini.run().code == 0
    toy.edit(mini.recipe, "steps: 3", "steps: 4\n    how: badly")
    assert mini.run().code == 1
    failed = next(history.of_recipe(Store(mini.home), "toy"))
    assert list(failed.keys) == ["words", "count"]


def test_an_answer_that_broke_comes_first_and_the_base_last():
    def answer(text, *faults):
        failures = [{"mode": fault, "detail": ""} for fault in faults]
        return {"question": "Q", "answer": text, "tool_calls": [], "failures": failures}

    then = {"base": answer("a"), "tuned": answer("a"), "nvfp4": answer("a")}
    now = {"base": answer("b"), "tuned": answer("b", "emoji"), "nvfp4": answer("b")}
    broke = difference._answer("broke", then, now)
    assert broke.change == "passed -> failed" and broke.columns == ("base", "nvfp4", "tuned")
    mended = difference._answer("mended", now, then)
    of_base = difference._answer("base", {"base": answer("a")}, {"base": answer("a", "emoji")})
    assert difference._answer("same", then, then) is None
    ordered = sorted([of_base, mended, broke], key=difference._rank)
    assert [each.id for each in ordered] == ["broke", "mended", "base"]


PACKAGE = """\
from pathlib import Path
from stages import job

SUPERVISOR = (
    "import json, os, sys\\n"
    "names = ('ANNIE_SERVING', 'ANNIE_MODEL')\\n"
    "print(json.dumps({name: os.environ[name] for name in names}))\\n"
    "sys.exit(3)\\n"
)

def run(task):
    (task.output / "text.txt").write_text("flags")
    (task.output / "serve.json").write_text('{"device": "cpu"}')
    (task.output / "server/stages/serving").mkdir(parents=True)
    (task.output / "server/stages/serving/supervisor.py").write_text(SUPERVISOR)

if __name__ == "__main__":
    job.main(run)
"""
BUILD = """
[parameters.serves]
type = "str"
default = "nvfp4"
choices = ["nvfp4", "tuned"]
doc = "which model"
[build]
image = "plain"
tag = "annie/served"
by = "serves"
[build.contexts]
nvfp4 = {checkpoint = "words"}
tuned = {checkpoint = "words", adapter = "words"}
"""


def test_serve_of_an_earlier_run_serves_what_that_run_made(mini, command):
    (mini.repo / "stages/count").rename(mini.repo / "stages/package")
    (mini.repo / "stages/package/__main__.py").write_text(PACKAGE)
    with (mini.repo / "stages/package/stage.toml").open("a") as contract:
        contract.write(BUILD)
    shutil.copytree(mini.repo / "images/plain", mini.repo / "images/vllm")
    toy.edit(mini.recipe, "  count: {}\n", "  package: {}\n")
    toy.edit(mini.recipe, "  slow:\n", "  slow:\n    inputs: {count: package}\n")
    served = []
    for upper in ("upper: false", "upper: true"):
        toy.edit(mini.recipe, "upper: false", upper)
        command("run")
        served.append({"ANNIE_MODEL": command("path", "words"), "ANNIE_SERVING": command("path", "package")})
    first = journal.stamp(journal.runs(mini.home, "toy")[-1])
    for more, paths in ((["--run", first], served[0]), ([], served[1])):
        said = command("serve", "--port", "18431", *more, code=1)
        assert "vLLM ended with 3" in said and "another environment" not in said
        told = json.loads((mini.home / "serving.log").read_text())
        assert told == {name: path.strip() for name, path in paths.items()}
    (mini.repo / "images/plain/note.txt").write_text("another lock")
    said = command("serve", "--port", "18431", "--run", first, code=1)
    assert "made for another environment (since then changed: note.txt)" in said
    (Path(served[0]["ANNIE_SERVING"].strip()) / "text.txt").unlink()
    assert "text.txt is missing" in command("serve", "--port", "18431", "--run", first, code=1)
