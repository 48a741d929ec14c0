"""The ways of a recipe: read with it, run one after the other, shown side by side."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import toy
from test_commands import command  # noqa: F401

from forge import picture, recipe
from forge.finding import Refused

STAGE = '''\
summary = "{name}"
image = "plain"
produces = "text"
[consumes]
{input} = "text"
[needs]
minutes = 0.1
disk_gb = 0.001
memory_gb = 0.1
'''
MAIN = '''\
import json
from stages import job

def run(its):
    said = (its.inputs["{input}"] / "text.txt").read_text()
    (its.output / "text.txt").write_text(said)
    share = 1.0 if "ALPHA" in said else 0.5
    (its.output / "{file}").write_text(json.dumps({made}))

if __name__ == "__main__":
    job.main(run)
'''
FIDELITY = '{"fidelity": {"tokens": 9, "loss": {"source": 1.0, "quantised": 2 - share}, "kl": 0.25, "greedy_agreement": 1.0, "layers": [0.1, 0.125]}}'
PASS = '{"pass": {"base": 0.0, "merged": 1.0, "nvfp4": share}}'


@pytest.fixture
def compared(its):
    """The miniature repository with stages that leave what `compare` reads, and two ways."""
    for name, source, file, made in (("quantize", "words", "audit.json", FIDELITY), ("evaluate", "quantize", "report.json", PASS)):
        folder = its.repo / "stages" / name
        folder.mkdir()
        (folder / "stage.toml").write_text(STAGE.format(name=name, input=source))
        (folder / "__main__.py").write_text(MAIN.format(input=source, file=file, made=made))
    toy.edit(its.recipe, "  count: {}\n", "  quantize: {}\n  evaluate: {}\n  count: {}\n")
    with its.recipe.open("a") as opened:
        opened.write("ways:\n  as-it-is: {}\n  loud: {words: {upper: true}}\n")
    return its


def test_every_way_is_run_and_shown_in_a_row(compared, command):  # noqa: F811
    text = command("compare")
    rows = [line.split() for line in text.splitlines()]
    assert ["as-it-is", "0%", "·", "100%", "50%", "1.000", "1.500", "0.2500", "12.5%", "lost"] in rows
    assert ["loud", "0%", "·", "100%", "100%", "1.000", "1.000", "0.2500", "12.5%", "kept"] in rows
    assert "nothing to do" not in text and "slow" not in text, "no further than evaluate"
    drawn = ElementTree.fromstring((compared.home / "compare-toy.svg").read_text())
    texts = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"as-it-is", "loud", "0.2500", "toy: what survives four bits"} <= set(texts)
    nvfp4 = [float(mark.get("cx")) for mark in drawn.iter("{http://www.w3.org/2000/svg}circle") if mark.get("r") == "5"]
    assert nvfp4 == [picture.LEFT + picture.WIDTH / 2, picture.LEFT + picture.WIDTH], "half of the questions, and all"
    last = next(line for line in command("compare", "--json").splitlines() if line.startswith('{"event": "compared"'))
    assert [(row["way"], row["kept"]) for row in json.loads(last)["ways"]] == [("as-it-is", False), ("loud", True)]


def test_a_recipe_without_ways_is_refused(its, command):  # noqa: F811
    assert "found no ways in recipe toy" in command("compare", code=1)


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("loud: {words: {uper: true}}", "found unknown key words.uper; expected a parameter of words. Did you mean upper?"),
        ("loud: {wrds: {upper: true}}", "found unknown stage wrds in the way loud; expected a stage of this recipe. Did you mean words?"),
        ("loud: {words: {upper: 3}}", "found words.upper = 3; expected bool"),
        ("'a/b': {}", "found the way 'a/b'; expected letters, digits and dashes"),
    ],
)
def test_a_fault_in_a_way_is_named_with_its_line(its, way, said):
    with its.recipe.open("a") as opened:
        opened.write(f"ways:\n  {way}\n")
    with pytest.raises(Refused) as refused:
        its.plan()
    assert any(said in str(fault) and "toy.yaml:14" in str(fault) for fault in refused.value.findings), refused.value.findings


def test_the_ways_of_the_small_recipe_read():
    ways = recipe.load(toy.REPO / "recipes" / "tiny.yaml", toy.REPO).ways
    assert ways["all-qad"].stages["train"].params["rounded_loss"] == "teacher" and ways["all-qad"].name == "tiny.all-qad"
    assert ways["attention"].stages == recipe.load(toy.REPO / "recipes" / "tiny.yaml", toy.REPO).stages
