"""`build.py schema` marks what `build.py plan` refuses, as far as a schema can. It is tried with the package
jsonschema, which vLLM brings.
"""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def schema():
    command = [REPO / ".venv/bin/python", REPO / "build.py", "schema"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    jsonschema.Draft202012Validator.check_schema(json.loads(printed))
    return jsonschema.Draft202012Validator(json.loads(printed))


def recipe(name="tiny"):
    return yaml.safe_load((REPO / f"recipes/{name}.yaml").read_text())


@pytest.mark.parametrize("name", ["tiny", "annie"])
def test_the_repositorys_recipes_fit(schema, name):
    assert [error.message for error in schema.iter_errors(recipe(name))] == []


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("gpu",), "auto"),
        (("seed",), -1),
        (("colour",), "red"),
        (("stages", "tarin"), {}),
        (("stages", "train", "learnign_rate"), 1e-3),
        (("stages", "train", "batch"), 0),
        (("stages", "train", "batch"), "many"),
        (("stages", "train", "method"), "full"),
        (("stages", "data", "sources", "prompts"), "x.txt"),
        (("stages", "evaluate", "gate"), {"tunde": 0.9}),
        (("stages", "evaluate", "gate"), {"tuned": "90%"}),
        (("stages", "evaluate", "checks"), {"markdown": {"allowed": ["lists"]}}),
        (("stages", "evaluate", "needs"), {"pids": 1}),
        (("variants", "attention", "train"), {"rnak": 4}),
    ],
)
def test_what_no_recipe_may_say_is_marked(schema, where, value):
    changed = copy.deepcopy(recipe())
    inner = changed
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    assert not schema.is_valid(changed)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("stages", "evaluate", "gate"), "none"),
        (("stages", "evaluate", "gate"), {"tuned": 0.9}),
        (("stages", "evaluate", "checks"), {"follow_up": False, "verbosity": {"max_words": 80}}),
        (("stages", "train", "learning_rate"), "1e-4"),
        (("stages", "merge"), None),
    ],
)
def test_what_a_recipe_may_say_is_not(schema, where, value):
    changed = recipe()
    changed[where[0]][where[1]] = (
        value if len(where) == 2 else {**changed[where[0]][where[1]], where[2]: value}
    )
    assert schema.is_valid(changed)
