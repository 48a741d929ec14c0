"""The variants of a recipe: read with it, run one after the other, shown side by side."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
import toy
from rich.console import Console

from forge import recipe
from forge.finding import Refused
from product import compare, picture, report

STAGE = """\
summary = "{name}"
image = "plain"
produces = "text"
[consumes]
{input} = "text"
[needs]
minutes = 0.1
disk_gb = 0.001
memory_gb = 0.1
"""
MAIN = """\
import json
from stages import job

def run(task):
    said = (task.inputs["{input}"] / "text.txt").read_text()
    (task.output / "text.txt").write_text(said)
    share = 1.0 if "ALPHA" in said else 0.5
    (task.output / "{file}").write_text(json.dumps({made}))

if __name__ == "__main__":
    job.main(run)
"""
FIDELITY = (
    '{"fidelity": {"tokens": 9, "loss": {"source": 1.0, "quantised": 2 - share}, "kl": 0.25,'
    ' "greedy_agreement": 1.0, "layers": [0.1, 0.125]}}'
)
PASS = '{"pass": {"base": 0.0, "merged": 1.0, "nvfp4": share}, "control": False}'
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def compared(mini):
    """The miniature repository with stages that leave what `compare` reads, and two variants."""
    for name, source, file, made in (
        ("quantize", "words", "audit.json", FIDELITY),
        ("evaluate", "quantize", "report.json", PASS),
    ):
        folder = mini.repo / "stages" / name
        folder.mkdir()
        (folder / "stage.toml").write_text(STAGE.format(name=name, input=source))
        (folder / "__main__.py").write_text(MAIN.format(input=source, file=file, made=made))
    toy.edit(mini.recipe, "  count: {}\n", "  quantize: {}\n  evaluate: {}\n  count: {}\n")
    with mini.recipe.open("a") as opened:
        opened.write("variants:\n  as-it-is: {}\n  loud: {words: {upper: true}}\n")
    return mini


def test_every_way_is_run_and_shown_in_a_row(compared, command):
    text = command("compare")
    rows = [line.split() for line in text.splitlines()]
    assert ["as-it-is", "0%", "·", "100%", "50%", "1.000", "1.500", "0.2500", "12.5%", "lost"] in rows
    assert ["loud", "0%", "·", "100%", "100%", "1.000", "1.000", "0.2500", "12.5%", "kept"] in rows
    assert "nothing to do" not in text and "slow" not in text, "no further than evaluate"
    said = "NVFP4 within 2 points of tuned: loud; not: as-it-is"
    assert said in text.splitlines()
    drawn = ElementTree.fromstring((compared.home / "compare-toy.svg").read_text())
    texts = [element.text for element in drawn.iter(f"{SVG}text")]
    assert {"as-it-is", "loud", "0.2500", "kept", "lost", said, "toy: what survives four bits"} <= set(texts)
    # the first is the legend's
    _, *nvfp4 = [float(mark.get("cx")) for mark in drawn.iter(f"{SVG}circle") if mark.get("r") == "5"]
    assert nvfp4 == [
        picture.LEFT + picture.WIDTH / 2,
        picture.LEFT + picture.WIDTH,
    ], "half of the questions, and all"
    last = next(
        line for line in command("compare", "--json").splitlines() if line.startswith('{"event": "compared"')
    )
    assert [(row["variant"], row["against"], row["verdict"]) for row in json.loads(last)["variants"]] == [
        ("as-it-is", "merged", "lost"),
        ("loud", "merged", "kept"),
    ]


@pytest.mark.parametrize(
    ("passed", "against", "verdict"),
    [
        ({"tuned": 1.0, "merged": 0.96, "nvfp4": 0.98}, "tuned", "kept"),  # 2 points: just kept
        ({"tuned": 1.0, "merged": 0.96, "nvfp4": 0.96}, "tuned", "lost"),
        ({"merged": 0.96, "nvfp4": 0.94}, "merged", "kept"),
        ({"merged": 0.96, "nvfp4": 0.92}, "merged", "lost"),
    ],
)
def test_a_way_keeps_what_was_tuned_if_nvfp4_is_within_two_points_of_it(passed, against, verdict):
    assert compare.judgement(passed, False) == {"against": against, "verdict": verdict}
    assert compare.judgement(passed, True)["verdict"] == "control", "nothing was taught that could be kept"


def test_the_verdict_names_the_ways_that_keep_and_those_that_do_not():
    rows = [
        {"variant": name, "verdict": verdict}
        for name, verdict in (("zero", "control"), ("ptq", "lost"), ("qat", "kept"), ("qad", "kept"))
    ]
    assert compare.verdict(rows) == "NVFP4 within 2 points of tuned: qat, qad; not: ptq"
    assert compare.verdict(rows[:2]) == "NVFP4 within 2 points of tuned: no variant; not: ptq"


def test_a_narrow_terminal_cuts_no_way_and_no_verdict():
    its = rows(3, 7)
    for row in its:
        row["fidelity"]["loss"] = {"source": 1.0, "quantised": 1.0}
    with (console := Console(width=60)).capture() as captured:
        console.print(report.of_compare(its, Path("picture.svg")), crop=False)  # as build.py shows it
    assert all(row["variant"] in captured.get() and row["verdict"] in captured.get() for row in its)


def rows(count, layers):
    """Rows as `collect` makes them; every second variant has a tuned column, and the last one's errors are
    all zero.
    """
    made = []
    for number in range(count):
        passed = {"base": 0.0, "merged": 1 - 0.02 * number, "nvfp4": max(0.0, 1 - 0.15 * number)} | (
            {"tuned": 1 - 0.02 * number} if number % 2 == 0 else {}
        )
        errors = [
            0.0 if number == count - 1 else (0.1 + 0.03 * number) * (layer / layers) ** 2
            for layer in range(layers)
        ]
        made.append(
            {
                "variant": f"a-variant-{10**number}",
                "pass": passed,
                "fidelity": {"kl": 0.1, "layers": errors},
                **compare.judgement(passed, False),
            }
        )
    return made


def drawn(its):
    return ElementTree.fromstring(picture.svg(its, "some: what survives four bits", compare.verdict(its)))


def boxes(svg):
    """(x, y, x, y) around every text and mark of a picture, by the width of a usual letter."""
    for text in svg.iter(f"{SVG}text"):
        size = float(text.get("font-size", 13))
        width, x, y = 0.58 * size * len(text.text), float(text.get("x")), float(text.get("y"))
        begin = x - {"end": width, "middle": width / 2}.get(text.get("text-anchor"), 0)
        yield text.text, (begin, y - 0.8 * size, begin + width, y + 0.25 * size)
    for mark in svg.iter(f"{SVG}circle"):
        x, y, radius = (float(mark.get(name)) for name in ("cx", "cy", "r"))
        yield None, (x - radius, y - radius, x + radius, y + radius)


@pytest.mark.parametrize("layers", [1, 7, 52])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 12])
def test_no_word_of_the_picture_lies_on_another_or_outside(count, layers):
    svg = drawn(rows(count, layers))
    found = list(boxes(svg))
    assert all(
        box[0] >= 0
        and box[1] >= 0
        and box[2] <= float(svg.get("width"))
        and box[3] <= float(svg.get("height"))
        for _, box in found
    )
    for (one, a), (other, b) in combinations(found, 2):
        if one or other:  # marks may lie on marks
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (one, other)


@pytest.mark.parametrize("layers", [1, 7, 52])
def test_every_way_has_a_curve_over_the_layers_and_its_end_in_the_legend(layers):
    its = rows(6, layers)
    svg = drawn(its)
    curves = {
        line.get("stroke"): [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in svg.iter(f"{SVG}polyline")
    }
    assert [len(curve) for curve in curves.values()] == [layers] * 6, "six colours"
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert {f"{row['variant']}, {row['fidelity']['layers'][-1]:.1%}" for row in its} <= set(texts) and {
        "layer",
        "1",
    } <= set(texts)
    bottom = max(y for curve in curves.values() for _, y in curve)
    ends = sorted(round(bottom - curve[-1][1], 1) for curve in curves.values())
    errors = sorted(row["fidelity"]["layers"][-1] for row in its)
    if layers > 1:
        assert [end / ends[-1] for end in ends] == pytest.approx(
            [error / errors[-1] for error in errors], abs=0.01
        ), "heights are errors, from zero"


def test_ways_whose_four_bits_were_not_measured_have_no_curves():
    its = [{**row, "fidelity": None} for row in rows(2, 7)]
    svg = drawn(its)
    assert (
        not list(svg.iter(f"{SVG}polyline"))
        and [text.text for text in svg.iter(f"{SVG}text")].count("not measured") == 2
    )


def test_a_recipe_without_ways_is_refused(mini, command):
    assert "found no variants in recipe toy" in command("compare", code=1)


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        (
            "loud: {words: {uper: true}}",
            "found unknown key words.uper; expected a parameter of words. Did you mean upper?",
        ),
        (
            "loud: {wrds: {upper: true}}",
            "found unknown stage wrds in the variant loud; expected a stage of this recipe."
            " Did you mean words?",
        ),
        ("loud: {words: {upper: 3}}", "found words.upper = 3; expected bool"),
        ("'a/b': {}", "found the variant 'a/b'; expected letters, digits and dashes"),
    ],
)
def test_a_fault_in_a_way_is_named_with_its_line(mini, variant, said):
    with mini.recipe.open("a") as opened:
        opened.write(f"variants:\n  {variant}\n")
    with pytest.raises(Refused) as refused:
        mini.plan()
    assert any(said in str(fault) and "toy.yaml:14" in str(fault) for fault in refused.value.findings), (
        refused.value.findings
    )


def test_the_ways_of_the_small_recipe_read():
    variants = recipe.load(toy.REPO / "recipes" / "tiny.yaml", toy.REPO).variants
    assert (
        variants["all-qad"].stages["train"].params["qat_loss"] == "teacher"
        and variants["all-qad"].name == "tiny.all-qad"
    )
    assert variants["zero"].stages["train"].params["steps"] == 0 and all(
        variants["zero"].stages[name].params["control"] for name in ("merge", "evaluate")
    )
    assert not any(variants["attention"].stages[name].params["control"] for name in ("merge", "evaluate"))
    assert variants["attention"].stages == recipe.load(toy.REPO / "recipes" / "tiny.yaml", toy.REPO).stages
