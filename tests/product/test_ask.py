"""build.py ask on the miniature repository, with a stage evaluate whose models are made up."""

from __future__ import annotations

import json
import textwrap

import pytest

from forge import journal
from forge.executor.local import Local
from forge.finding import Refused
from product import ask

EVALUATE = """\
    summary = "asking"
    image = "plain"
    produces = "text"
    apart = ["ask.py"]
    [consumes]
    count = "text"
    [needs]
    minutes = 1
    """
ASK = """\
    import json
    from stages import job

    def run(task):
        asked = json.loads((task.scratch / "given.json").read_text())
        if "<think>" in asked:
            raise job.StageError("a control token", "a text", "Write it another way.")
        job.progress(1, 2, "question", "base")
        call = {"function": {"name": "set_timer", "arguments": '{"minutes": 5}'}}
        answers = {
            "base": [{"content": f"{n}? Great question!", "tool_calls": []} for n in asked],
            "nvfp4": [{"content": None, "tool_calls": [call]} for _ in asked],
        }
        print("inputs", sorted(task.inputs), flush=True)
        (task.output / "ask.json").write_text(json.dumps(answers))

    if __name__ == "__main__":
        job.main(run)
    """


@pytest.fixture
def asked(mini):
    folder = mini.repo / "stages/evaluate"
    folder.mkdir()
    (folder / "stage.toml").write_text(textwrap.dedent(EVALUATE))
    (folder / "__main__.py").write_text("")
    (folder / "ask.py").write_text(textwrap.dedent(ASK))
    with mini.recipe.open("a") as recipe:
        recipe.write("  evaluate: {}\n")
    mini.run(last="count")
    return mini


def test_every_question_has_every_models_answer(asked, command):
    text = "\n".join(line.rstrip() for line in command("ask", "Set a timer", "Hello").splitlines())
    assert "  user  Set a timer\n" in text and "  base  Set a timer? Great question!\n" in text
    assert ' nvfp4  [calls set_timer({"minutes": 5})]\n' in text
    assert text.index("Set a timer? Great") < text.index("user  Hello\n") < text.index("Hello? Great")
    last = json.loads(command("ask", "Hello", "--json").splitlines()[-1])
    assert last["event"] == "asked" and last["answers"]["base"]["content"] == "Hello? Great question!"


def test_it_leaves_no_artifact_and_the_question_nowhere(asked, command):
    before = asked.states()
    command("ask", "My secret plan")
    assert asked.states() == before and not list((asked.home / "store").glob("*/ask/*"))
    assert len(journal.runs(asked.home, "toy.ask")) == 1
    texts = [path.read_text() for path in asked.home.rglob("*") if path.suffix in (".json", ".jsonl", ".log")]
    assert texts and not any("My secret plan" in text for text in texts)


def test_what_is_not_built_and_what_cannot_be_asked_is_said(asked, command):
    said = " ".join(command("ask", "<think>", code=1).split())
    assert "ask failed found a control token expected a text remedy Write it another way." in said
    (asked.repo / "data/a.txt").write_text("other words")
    with pytest.raises(Refused, match="count: found no artifact"):
        ask.ask(asked.context(), Local(asked.repo, asked.home), ["Hello"], asked.events.append)


def test_a_recipe_without_an_evaluation_is_refused(mini):
    with pytest.raises(Refused, match="no stage evaluate in recipe"):
        ask.ask(mini.context(), Local(mini.repo, mini.home), ["Hello"], mini.events.append)
