"""build.py data on the miniature repository, with stages base and data whose rows are made up."""

from __future__ import annotations

import io
import json
import os
import textwrap

import pytest
import toy
from rich.console import Console

from forge import lock
from product import data_shown

BASE = """\
    summary = "a base"
    image = "plain"
    produces = "text"
    apart = ["tokenizer_files.py"]
    """
DATA = """\
    summary = "rows"
    image = "plain"
    produces = "text"
    apart = ["preview.py"]
    [consumes]
    base = "text"
    [sources.conversations]
    doc = "rows"
    """
TRAIN = """\
    summary = "training"
    image = "plain"
    produces = "text"
    [consumes]
    data = "text"
    [parameters.batch]
    type = "int"
    default = 8
    doc = "batch"
    [parameters.batch_tokens]
    type = "int"
    default = 0
    doc = "tokens"
    [parameters.epochs]
    type = "float"
    default = 0.0
    doc = "epochs"
    [parameters.steps]
    type = "int"
    default = 30
    doc = "steps"
    """
WRITES = """\
    from stages import job

    def run(task):
        (task.output / "text.txt").write_text("WHO")

    if __name__ == "__main__":
        job.main(run)
    """
PREVIEW = """\
    import json
    from stages import job

    def run(task):
        asked = json.loads((task.scratch / "given.json").read_text())
        print("tokenizer of", (task.inputs["base"] / "text.txt").read_text(), flush=True)
        bad = "bad" in task.sources["conversations"][0].read_text()
        prompt = "<system>" + "Be brief.\\n" * 30 + "<user>"
        cut = [(prompt + "Hello\\x1b[2J", False), ("Hi there.<end>", True), ("\\n", False)]
        pieces = [{"text": text, "trained": trained} for text, trained in cut]
        row = {"state": "train", "tokens": 70, "trained_tokens": 5, "pieces": pieces}
        rows = [{"state": "absent", "file": "a.txt", "line": 99} for place in asked["rows"] if ":99" in place]
        rows += [{**row, "file": "data/a.txt", "line": n + 1} for n in range(asked["first"])]
        counts = {"train": 41, "eval": 5, "rejected": 2, "duplicates": 1, "longest": 70, "median_length": 60}
        counts |= {"tokens": 2760, "trained_share": 0.0714}
        refused = {"found": "2 of 3 rows are bad", "expected": "at most 1%", "remedy": "Mend them."}
        reasons = [
            {"reason": "90 tokens, max_tokens is 80", "count": 2, "file": "data/a.txt", "line": 7,
             "raise": {"max_tokens": 95}}
        ]
        if bad:
            (task.output / "rejects.jsonl").write_text("{}\\n{}\\n")
        report = {"refused": refused if bad else None, "counts": None if bad else counts,
                  "reasons": reasons if bad else [], "rows": rows}
        (task.output / "preview.json").write_text(json.dumps(report))

    if __name__ == "__main__":
        job.main(run)
    """


@pytest.fixture
def given(mini):
    files = {
        "base/stage.toml": BASE,
        "base/__main__.py": WRITES.replace("WHO", "the stage"),
        "base/tokenizer_files.py": WRITES.replace("WHO", "the module"),
        "data/stage.toml": DATA,
        "data/__main__.py": "",
        "data/preview.py": PREVIEW,
        "train/stage.toml": TRAIN,
        "train/__main__.py": "",
    }
    for name, text in files.items():
        path = mini.repo / "stages" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    with mini.recipe.open("a") as recipe:
        recipe.write("  base: {}\n  data: {sources: {conversations: ../data/a.txt}}\n  train: {}\n")
    return mini


def log(mini, name):
    return next(path.read_text() for path in sorted(mini.home.glob(f"runs/*preview/*{name}.log"))[::-1])


def test_it_counts_and_shows_a_row_and_makes_no_artifact(given, command):
    before = given.states()
    text = "\n".join(line.rstrip() for line in command("data").splitlines())
    assert "rows to train on    41  an epoch is 6 steps of 8; 30 steps are 5.85 epochs\n" in text
    assert "trained           7.1%  of 2,760 tokens" in text
    assert "data/a.txt:1, train: 5 of 70 tokens are trained\n<system>Be brief.\n" in text
    assert "<user>Hello\\x1b[2J[[Hi there.<end>]]\n" in text
    assert given.states() == before and not list((given.home / "store").glob("*/preview/*"))
    assert not list(given.home.rglob("rejects.jsonl"))


def test_the_base_is_used_where_it_is_built(given, command):
    command("data")
    assert "tokenizer of the module" in log(given, "preview")
    given.run(last="base")
    command("data")
    assert "tokenizer of the stage" in log(given, "preview")
    newest = sorted(given.home.glob("runs/*preview"))[-1]
    assert not list(newest.glob("*tokenizer_files*"))


def test_what_stage_data_would_refuse_is_told_and_kept(given, command):
    (given.repo / "data/a.txt").write_text("bad")
    text = command("data", code=1)
    words = " ".join(text.split())
    assert "data: found 2 of 3 rows are bad; expected at most 1% Mend them." in words
    assert "2 data/a.txt:7 90 tokens, max_tokens is 80 max_tokens: 95 lets them in" in words
    [kept] = given.home.glob("runs/*preview/rejects.jsonl")
    assert kept.read_text() == "{}\n{}\n" and kept.stat().st_mode & 0o777 == 0o600
    last = json.loads(command("data", "--json", code=1).splitlines()[-1])
    assert last["event"] == "previewed" and last["rejects"].endswith("rejects.jsonl") and not last["steps"]


def test_rows_are_named_by_file_and_line_and_one_that_is_not_there_is_a_failure(given, command):
    assert "a.txt:99: no such row" in command("data", "--row", "a.txt:99", code=1)
    text = command("data", "--rows", "3")
    assert text.count("Be brief.") == 30 and text.count("... 308 characters as above") == 2
    assert "train: 5 of" not in command("data", "--row", "a.txt:1")
    for wrong in ("a.txt", "a.txt:", ":3", "a.txt:0", "a.txt:x", "a.txt:²"):
        assert "expected FILE:LINE" in command("data", "--row", wrong, code=2)


def test_it_does_not_wait_for_a_run_where_it_must_not(given, command):
    with lock.held(given.home / "store/lock", True, lambda who: None):
        assert f"held by process {os.getpid()}" in command("data", "--no-wait", code=1)


def test_a_recipe_without_stage_data_is_refused(mini, command):
    assert "found no stage data in recipe" in command("data", code=1)


def test_steps_follow_from_epochs(given, command):
    toy.edit(given.recipe, "train: {}", "train: {epochs: 2}")
    steps = json.loads(command("data", "--json").splitlines()[-1])["steps"]
    assert steps == {"batch": 8, "epoch": 6, "steps": 11, "epochs": 2.0}


def drawn(renderable, **settings):
    out = io.StringIO()
    Console(file=out, width=80, **settings).print(renderable)
    return out.getvalue()


def test_trained_text_is_green_and_between_marks_without_colours(monkeypatch):
    text = data_shown.TrainedText([{"text": "asked ", "trained": False}, {"text": "told", "trained": True}])
    colours = {"force_terminal": True, "color_system": "standard"}
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert drawn(text, **colours) == "asked \x1b[32mtold\x1b[0m\n"
    assert drawn(text) == "asked [[told]]\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "asked [[told]]" in drawn(text, **colours)
