"""Parameters: every bound of every contract, and the shape of what stands in a map."""

from __future__ import annotations

import re

import pytest
import toy
import yaml

from forge import artifact_types, contract, recipe
from forge.finding import Refused
from forge.parameter import Parameter, Unfit

CONTRACTS = {
    path.parent.name: contract.load(path.parent, artifact_types.load(toy.REPO / "stages"))
    for path in sorted((toy.REPO / "stages").glob("*/stage.toml"))
}
NUMBERS = [
    (stage, name, p)
    for stage, its in CONTRACTS.items()
    for name, p in its.parameters.items()
    if p.type in ("int", "float")
]


def refused(parameter: Parameter, value) -> list[tuple]:
    with pytest.raises(Unfit) as unfit:
        parameter.accept(value)
    return [(fault.where, fault.found, fault.expected) for fault in unfit.value.faults]


@pytest.mark.parametrize(
    ("stage", "name", "parameter"), NUMBERS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_number_has_a_lower_bound_and_refuses_what_is_outside(stage, name, parameter):
    lowest = parameter.min if parameter.min is not None else parameter.above
    assert lowest is not None and lowest >= 0, f"{stage}.{name} takes negative numbers"
    least = parameter.multiple_of or 1 if parameter.type == "int" else 1e-9
    outside = [
        -1,
        *([lowest - least] if parameter.min is not None else [lowest]),
        *([parameter.max + least] if parameter.max is not None else []),
    ]
    for value in [*outside, float("nan"), float("inf"), True, "many", None]:
        if value not in parameter.also:
            refused(
                parameter,
                (
                    int(value)
                    if parameter.type == "int" and isinstance(value, float) and value.is_integer()
                    else value
                ),
            )
    for value in (parameter.min, parameter.max, *parameter.also):
        if value is not None:
            parameter.accept(int(value) if parameter.type == "int" else value)


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("train", "rank", 513),
        ("train", "learning_rate", 0),
        ("train", "learning_rate", -0.003),
        ("train", "learning_rate", 3),
        ("train", "steps", 1),
        ("train", "steps", 2),
        ("train", "max_grad_norm", 0),
        ("train", "weight_decay", -0.1),
        ("train", "qat_share", 1.1),
        ("train", "min_loss_drop", 75),
        ("train", "batch_tokens", 15),
        ("base", "hidden", 192),
        ("base", "pattern", "MEME"),
        ("base", "pattern", "M*X"),
        ("base", "commit", "main"),
        ("base", "learning_rate", 0.0),
        ("base", "short_tokens", 0),
        ("base", "batch_tokens", 1),
        ("data", "eval_share", 0.6),
        ("data", "max_reject_share", 1.5),
        ("evaluate", "memory_share", 0.96),
        ("evaluate", "concurrency", 0),
        ("package", "max_num_seqs", 0),
        ("package", "memory_share", 0.0),
        ("merge", "proof_tokens", -1),
        ("quantize", "calibration_rows", 0),
    ],
)
def test_values_that_no_run_can_use_are_refused(stage, name, value):
    refused(CONTRACTS[stage].parameters[name], value)


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("train", "rank", 512),
        ("train", "steps", 0),
        ("train", "steps", 3),
        ("train", "learning_rate", "3e-3"),
        ("data", "eval_share", 0),
        ("base", "commit", "cbd3fa9f933d55ef16a84236559f4ee2a0526848"),
        ("base", "pattern", "*"),
        ("base", "hidden", 256),
    ],
)
def test_values_at_the_edge_are_accepted(stage, name, value):
    CONTRACTS[stage].parameters[name].accept(value)


def written(folder, change):
    """The tiny recipe with `change` made to its stages, as a file."""
    text = (toy.REPO / "recipes" / "tiny.yaml").read_text()
    raw = yaml.safe_load(text.replace("../data", f"{toy.REPO}/data"))
    change(raw["stages"])
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def faults(folder, **changes):
    """What reading the tiny recipe says when stages have these parameters too."""

    def change(stages):
        for stage, values in changes.items():
            stages[stage].update(values)

    try:
        recipe.load(written(folder, change), toy.REPO)
    except Refused as refused:
        return [str(f).partition(": found ")[2] for f in refused.findings]
    return []


def test_a_warm_up_is_not_longer_than_the_steps(tmp_path):
    assert (
        faults(tmp_path, train={"steps": 20, "warmup_steps": 20})
        == []
        == faults(tmp_path, train={"steps": 0, "warmup_steps": 500})
    )
    assert (
        "train.warmup_steps = 500; expected at most steps, which is 40"
        in faults(tmp_path, train={"warmup_steps": 500, "steps": 40})[0]
    )
    assert (
        "evaluate.max_tokens = 4096; expected at most max_model_len, which is 2048"
        in faults(tmp_path, evaluate={"max_tokens": 4096})[0]
    )


def test_a_default_that_another_parameter_forbids_is_called_one(mini):
    toy.edit(
        mini.repo / "stages/slow/stage.toml",
        "[parameters.seconds]\n",
        '[parameters.seconds]\nat_most = "steps"\n',
    )
    toy.edit(mini.repo / "stages/slow/stage.toml", "default = 0.0", "default = 4.0")
    with pytest.raises(
        Refused, match=r"slow.seconds = 4.0 \(the default\); expected at most steps, which is 3"
    ):
        mini.plan()


def test_at_most_names_a_number_of_the_same_stage(mini):
    toy.edit(
        mini.repo / "stages/slow/stage.toml",
        "[parameters.seconds]\n",
        '[parameters.seconds]\nat_most = "stepz"\n',
    )
    with pytest.raises(
        Refused,
        match=(
            "parameters.seconds.at_most = 'stepz'; expected a number among the stage's parameters. Did you"
            " mean steps?"
        ),
    ):
        mini.plan()


BOTH = (
    "train.batch_tokens = 4096 and train.batch = 8; expected one of batch_tokens and batch. "
    "Leave out batch to use batch_tokens, or batch_tokens to use batch."
)


def test_conversations_and_tokens_of_a_step_are_not_both_given(tmp_path):
    assert faults(tmp_path, train={"batch_tokens": 4096}) == [BOTH]
    assert faults(tmp_path, train={"batch_tokens": 0}) == []

    def tokens_alone(stages):
        del stages["train"]["batch"]
        stages["train"]["batch_tokens"] = 4096

    alone = written(tmp_path, tokens_alone)
    assert recipe.load(alone, toy.REPO).stages["train"].params["batch_tokens"] == 4096


def test_steps_and_epochs_are_not_both_given(tmp_path):
    [fault] = faults(tmp_path, train={"epochs": 3, "steps": 40, "warmup_steps": 20})
    assert "train.epochs = 3.0 and train.steps = 40; expected one of epochs and steps" in fault


def test_a_parameter_that_another_replaces_sets_no_limit(tmp_path):
    def epochs_alone(stages):
        del stages["train"]["steps"]
        stages["train"] |= {"epochs": 30, "warmup_steps": 500}

    params = recipe.load(written(tmp_path, epochs_alone), toy.REPO).stages["train"].params
    assert (params["epochs"], params["warmup_steps"]) == (30.0, 500)


def with_a_variant(path, given):
    """Replaces the recipe's variants by one, `other`, with these parameters of stage train."""
    raw = yaml.safe_load(path.read_text()) | {"variants": {"other": {"train": given}}}
    path.write_text(yaml.safe_dump(raw, sort_keys=False))


@pytest.mark.parametrize(
    ("own", "given", "batch", "batch_tokens"),
    [
        ({"batch": 4}, {"batch_tokens": 4096}, 8, 4096),
        ({"batch_tokens": 4096}, {"batch": 4}, 4, 0),
        ({"batch": 4}, {"batch_tokens": 0}, 4, 0),
        ({"batch": 4}, {"rank": 8}, 4, 0),
        ({"batch_tokens": 4096}, {"rank": 8}, 8, 4096),
    ],
)
def test_in_a_variant_the_one_that_is_given_replaces_the_other(tmp_path, own, given, batch, batch_tokens):
    path = written(tmp_path, lambda stages: (stages["train"].pop("batch"), stages["train"].update(own)))
    with_a_variant(path, given)
    params = recipe.load(path, toy.REPO).variants["other"].stages["train"].params
    assert (params["batch"], params["batch_tokens"]) == (batch, batch_tokens)


def test_a_variant_that_gives_both_is_refused(tmp_path):
    path = written(tmp_path, lambda stages: None)
    with_a_variant(path, {"batch": 8, "batch_tokens": 4096})
    with pytest.raises(Refused, match="train.batch_tokens = 4096 and train.batch = 8; expected one of"):
        recipe.load(path, toy.REPO)


@pytest.mark.parametrize(
    ("stage", "given", "said"),
    [
        ("train", {"rounded_share": 0.3}, "unknown key train.rounded_share; .*It is called qat_share now"),
        ("train", {"rounded_loss": "teacher"}, "unknown key train.rounded_loss; .*It is called qat_loss now"),
        ("quantize", {"layout": "official"}, "quantize.layout = 'official'; .*It is called nvidia now"),
    ],
)
def test_an_old_name_is_answered_with_the_new_one(tmp_path, stage, given, said):
    path = written(tmp_path, lambda stages: stages.setdefault(stage, {}).update(given))
    with pytest.raises(Refused, match=said):
        recipe.load(path, toy.REPO)


def test_so_is_an_old_key_of_a_recipe(tmp_path):
    path = written(tmp_path, lambda stages: None)
    path.write_text(path.read_text() + "ways: {}\n")
    with pytest.raises(
        Refused, match="unknown key ways; expected a key of a recipe. It is called variants now"
    ):
        recipe.load(path, toy.REPO)


def test_instead_of_names_a_parameter_of_the_same_stage(mini):
    toml = mini.repo / "stages/slow/stage.toml"
    toy.edit(toml, "[parameters.seconds]\n", '[parameters.seconds]\ninstead_of = "stepz"\n')
    with pytest.raises(Refused, match=r"instead_of = 'stepz'; expected another .*Did you mean steps\?"):
        mini.plan()


SHARE = Parameter("float", doc="0.9 is 90 %", min=0, max=1)
MAP = Parameter(
    "map",
    also=("none",),
    keys=("one", "two"),
    each=SHARE,
    fields={"least": SHARE, "of": Parameter("str", choices=("one", "two"))},
)


def test_a_map_is_checked_to_its_last_value():
    assert MAP.accept({"one": 1, "two": {"least": "0.5", "of": "one"}}) == {
        "one": 1.0,
        "two": {"least": 0.5, "of": "one"},
    }
    assert MAP.accept("none") == "none" and MAP.accept({}) == {}
    assert refused(MAP, {"tow": 1, "one": "90%", "two": {"leest": 1, "of": "six"}}) == [
        (("tow",), "unknown key tow", "one of one, two"),
        (("one",), "'90%'", "float at least 0 and at most 1, or a map with least, of"),
        (("two", "leest"), "unknown key leest", "one of least, of"),
        (("two", "of"), "'six'", "one of one, two"),
    ]


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "non\u0435",  # a Cyrillic letter
        "None",
        0.9,
        {"one": None},
        {"one": 90},
        {"one": True},
        {"one": {}},
        {"one": [0.9]},
        {1: 0.5},
    ],
)
def test_what_is_not_of_that_shape_is_refused(value):
    assert refused(MAP, value)


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        (
            {"tunde": 0.9},
            (
                "unknown key evaluate.gate.tunde; expected one of base, tuned, merged, nvfp4. Did you mean"
                " tuned?"
            ),
        ),
        ({"tuned": 90}, "evaluate.gate.tuned = 90; expected float above 0 and at most 1, or a map"),
        ({"tuned": "90%"}, "evaluate.gate.tuned = '90%'; expected float above 0 and at most 1"),
        (
            {"tuned": {"at_leest": 1}},
            (
                "unknown key evaluate.gate.tuned.at_leest; expected one of at_least, above, within, of. Did"
                " you mean at_least?"
            ),
        ),
        (
            {"nvfp4": {"within": 2, "of": "tuned"}},
            "evaluate.gate.nvfp4.within = 2; expected float at least 0 and at most 1",
        ),
        (
            {"tuned": 0.0},
            "evaluate.gate.tuned = 0.0; expected float above 0",
        ),  # asks nothing: that is gate: none
        (None, "evaluate.gate = None; expected map with keys of base, tuned, merged, nvfp4 or none"),
    ],
)
def test_a_gate_is_checked_before_anything_runs(tmp_path, gate, said):
    found = faults(tmp_path, evaluate={"gate": gate})
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    "gate",
    [
        "none",
        {},
        {"tuned": 0.9},
        {"tuned": {"at_least": 0.8, "above": "base"}, "nvfp4": {"within": 0.02, "of": "tuned"}},
    ],
)
def test_a_gate_that_can_be_held_is_accepted(tmp_path, gate):
    assert faults(tmp_path, evaluate={"gate": gate}) == []


def test_seeds_and_needs_have_ranges_too(mini):
    toy.edit(mini.recipe, "seed: 3", "seed: -3")
    toy.edit(mini.recipe, "{minutes: 0.5}", "{memory_gb: 0, pids: 1, minutes: -1}")
    with pytest.raises(Refused) as refused:
        mini.plan()
    assert [(f.found, f.expected) for f in refused.value.findings[1:]] == [
        ("slow.needs.memory_gb = 0", "0.1 or more"),
        ("slow.needs.pids = 1", "64 or more"),
        ("slow.needs.minutes = -1", "0 or more"),
    ]
    assert refused.value.findings[0].found == "seed = -3"


@pytest.mark.parametrize(
    ("line", "found", "expected"),
    [
        ('memory_gb = "much"', "memory_gb = 'much'", "float"),
        ("memory_gb = 0", "memory_gb = 0", "0.1 or more"),
        ("minutes = -1", "minutes = -1", "0 or more"),
        ("pids = 100.5", "pids = 100.5", "int"),
        ("gpu = 1", "gpu = 1", "bool"),
    ],
)
def test_the_needs_of_a_contract_are_checked_as_those_of_a_recipe(mini, line, found, expected):
    toy.edit(mini.recipe, "{minutes: 0.5}", f"{{{line.replace(' =', ':')}}}")
    with pytest.raises(Refused) as by_recipe:
        mini.plan()
    toy.edit(mini.recipe, f"{{{line.replace(' =', ':')}}}", "{}")
    path = mini.repo / "stages/slow/stage.toml"
    path.write_text(re.sub(r"\[needs\][^\[]*", f"[needs]\n{line}\n", path.read_text()))
    with pytest.raises(Refused) as by_contract:
        mini.plan()
    [said], [told] = by_recipe.value.findings, by_contract.value.findings
    assert (said.found, said.expected) == (f"slow.needs.{found}", expected)
    assert (told.found, told.expected) == (f"needs.{found}", expected)
    assert told.subject == "stages/slow/stage.toml"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            '[parameters.map]\ntype = "map"\nkeys = ["a"]\neach = {type = "flaot"}',
            "parameters.map.each.type = 'flaot'",
        ),
        (
            '[parameters.map]\ntype = "map"\nkeys = ["a"]\n[parameters.map.fields.x]\ntype = "int"\nmni = 1',
            "unknown key parameters.map.fields.x.mni; expected a key of this table. Did you mean min?",
        ),
        (
            '[parameters.map]\ntype = "map"\nkeys = ["a"]\neach = {type = "int"}\ndefault = {b = 1}',
            "parameters.map.default = {'b': 1}; expected one of a",
        ),
    ],
)
def test_a_fault_inside_a_described_map_is_named_with_its_place(mini, table, said):
    with (mini.repo / "stages/slow/stage.toml").open("a") as opened:
        opened.write(f"{table}\n")
    with pytest.raises(Refused) as refused:
        mini.plan()
    assert any(said in str(finding) for finding in refused.value.findings), refused.value.findings
