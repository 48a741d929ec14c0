"""The dataclass of a stage's parameters: what it says, that it is up to date, and that it decides no key."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import toy

from forge import artifact_types, contract, plan, typed_parameters
from forge.finding import Refused
from stages import job
from stages.check import PlannedStage

STAGES = sorted(path.parent for path in (toy.REPO / "stages").glob("*/stage.toml"))


def loaded(folder):
    """The contract of a stage's folder, which may lie anywhere."""
    return contract.load(folder, {**artifact_types.load(toy.REPO / "stages"), "text": ("text.txt",)})


@pytest.mark.parametrize("folder", STAGES, ids=lambda folder: folder.name)
def test_every_dataclass_is_what_its_contract_says(folder):
    path = folder / typed_parameters.NAME
    if path.exists():
        text = typed_parameters.source(loaded(folder))
        assert path.read_text() == text, f"{path} is out of date: run `make parameters`"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "stages" / "hello"
    folder.mkdir(parents=True)
    (folder / "stage.toml").write_text(
        'summary = "x"\nimage = "train"\nproduces = "report"\n'
        '[parameters.name]\ntype = "str"\ndoc = "whom"\n'
        '[parameters.way]\ntype = "str"\ndefault = "loud"\nchoices = ["loud", "soft"]\n'
        '[parameters.times]\ntype = "int"\ndefault = 0\nmin = 2\nalso = [0]\n'
        '[parameters.words]\ntype = "list[str]"\ndefault = []\n'
        '[parameters.gate]\ntype = "map"\ndefault = {}\nalso = ["none"]\n'
    )
    return folder


EXPECTED = '''"""The parameters of stage hello, \
made by `make parameters` from stage.toml: change that file instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Parameters:
    # whom
    name: str
    way: Literal["loud", "soft"]
    times: int
    words: list[str]
    gate: dict[str, Any] | Literal["none"]
'''


def test_each_type_of_a_contract_has_a_type_of_python(folder):
    assert typed_parameters.write(loaded(folder))
    assert (folder / "parameters.py").read_text() == EXPECTED
    assert not typed_parameters.write(loaded(folder))


def test_a_module_of_that_name_that_somebody_wrote_is_left_alone(folder):
    (folder / "parameters.py").write_text("MINE = 1\n")
    with pytest.raises(Refused, match="a module of your own"):
        typed_parameters.write(loaded(folder))
    assert (folder / "parameters.py").read_text() == "MINE = 1\n"


@pytest.fixture
def kind(folder, monkeypatch):
    """The dataclass of the stage `hello`."""
    typed_parameters.write(loaded(folder))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "parameters", raising=False)
    import parameters

    yield parameters.Parameters
    del sys.modules["parameters"]


GIVEN = {"name": "Ada", "way": "soft", "times": 2, "words": [], "gate": "none"}


def test_a_job_becomes_the_dataclass(kind, tmp_path):
    made = job.Job("hello", GIVEN, {}, tmp_path, tmp_path, 0).parameters(kind)
    assert (
        dataclasses.asdict(made) == GIVEN == dataclasses.asdict(PlannedStage("hello", GIVEN).parameters(kind))
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.times = 3


@pytest.mark.parametrize(
    ("params", "found"),
    [
        ({"name": "Ada", "way": "soft", "gate": {}}, "in the job's params: no times, words"),
        (GIVEN | {"nmae": "Ada"}, "in the job's params: unknown nmae"),
        ({"x": 1}, "no name, way, times, words, gate; unknown x"),
    ],
)
def test_a_job_that_lacks_parameters_or_has_others_is_refused_by_their_names(kind, params, found):
    with pytest.raises(job.StageError, match=f"{found}; expected exactly the parameters of parameters"):
        job.typed(kind, params)


def test_the_dataclass_decides_no_key_while_it_follows_the_contract(mini):
    def key():
        return plan.planned_stage(mini.context(), "words").key.components

    before = key()
    folder = mini.repo / "stages" / "words"
    typed_parameters.write(loaded(folder))
    assert key() == before
    toy.edit(folder / "stage.toml", '"shout"', '"in capitals"')
    assert key() == before  # as comments are, also where the file is not written again
    typed_parameters.write(loaded(folder))
    assert "# in capitals" in (folder / "parameters.py").read_text() and key() == before
    toy.edit(folder / "parameters.py", "upper: bool", "upper: int")
    assert key().keys() - before.keys() == {"code/stages/words/parameters.py"}


def test_a_module_of_that_name_without_a_contract_for_it_is_code(mini):
    (mini.repo / "stages/words/parameters.py").write_text("TABLE = {}\n")
    assert "code/stages/words/parameters.py" in plan.planned_stage(mini.context(), "words").key.components
