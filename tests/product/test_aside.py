"""Modules beside the line, one after the other: each reads what the one before it wrote."""

from __future__ import annotations

import json
import textwrap

import pytest
import toy

from forge.executor.local import Local
from product import aside

FIRST = """\
    from stages import job

    def run(task):
        if "token" in task.secrets:
            print("the token is", task.secrets["token"].read_text(), flush=True)
        words = task.sources["files"][0].read_text().split()
        if "broken" in words:
            raise job.StageError("a broken word", "a whole one", "Mend it.")
        (task.output / "text.txt").write_text(" ".join(words))

    if __name__ == "__main__":
        job.main(run)
    """
SECOND = """\
    import json
    from stages import job

    def run(task):
        text = (task.inputs["words"] / "text.txt").read_text()
        (task.output / "kept.txt").write_text("a word of the user")
        (task.output / "second.json").write_text(json.dumps({"text": text}))

    if __name__ == "__main__":
        job.main(run)
    """


@pytest.fixture
def modules(mini):
    for stage, name, code in (("words", "first", FIRST), ("count", "second", SECOND)):
        (mini.repo / f"stages/{stage}/{name}.py").write_text(textwrap.dedent(code))
        contract = mini.repo / f"stages/{stage}/stage.toml"
        toy.edit(contract, 'image = "plain"', f'image = "plain"\napart = ["{name}.py"]')

    def run():
        stages = mini.context().recipe.stages
        chain = [
            aside.Module(stages["words"], "first", "words", 1.0),
            aside.Module(stages["count"], "second", "a count", 1.0, keeps="kept.txt"),
        ]
        mini.events.clear()
        executor = Local(mini.repo, mini.home)
        return aside.run(mini.context(), executor, chain, "build.py it", mini.events.append)

    return run


def test_what_a_module_wrote_is_the_input_of_the_next(mini, modules):
    report, task = modules()
    assert report == {"text": "alpha beta"}
    kept = task.folder / "kept.txt"
    assert kept.read_text() == "a word of the user" and kept.stat().st_mode & 0o777 == 0o600
    store = mini.home / "store"
    assert not list(store.glob("tmp/*")) and not list(store.glob("scratch/*/*"))
    assert not (store / "artifacts").exists()
    said = [(event["event"], event.get("stage")) for event in mini.events if event["event"] != "log"]
    assert said == [
        ("plan", None),
        ("stage", "first"),
        ("stage_done", "first"),
        ("stage", "second"),
        ("stage_done", "second"),
        ("done", None),
    ]


def test_a_failure_ends_the_chain(mini, modules):
    (mini.repo / "data/a.txt").write_text("a broken word")
    assert modules() is None
    failed = mini.event("failed")
    assert (failed["stage"], failed["found"]) == ("first", "a broken word")
    assert not list((mini.home / "store").glob("tmp/*")) and not list((mini.home / "runs").glob("*/kept.txt"))


def test_a_secret_reaches_only_a_module_with_the_network_and_no_log(mini, modules, tmp_path):
    (tmp_path / "token").write_text("a very secret word\n")
    toy.edit(mini.recipe, "seed: 3", f"seed: 3\nsecrets: {{token: {tmp_path / 'token'}}}")
    modules()
    assert not any("the token is" in event.get("line", "") for event in mini.events)
    toy.edit(mini.recipe, "upper: false", "upper: false\n    needs: {network: true}")
    modules()
    assert [event["line"] for event in mini.events if "the token is" in event.get("line", "")] == [
        "the token is [secret]"
    ]


def test_a_module_gets_the_stages_earlier_artifact_where_the_contract_asks_for_it(mini, modules):
    toy.edit(mini.repo / "stages/words/stage.toml", 'image = "plain"', 'image = "plain"\nprevious = true')
    _, task = modules()
    assert "previous" not in json.loads((task.folder / "01-first.json").read_text())
    mini.run(last="words")
    _, task = modules()
    made = json.loads((task.folder / "01-first.json").read_text())["previous"]
    assert made == str(mini.context().store.newest("words", "toy").folder)
