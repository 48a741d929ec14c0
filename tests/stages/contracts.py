"""The parameters of a stage as forge fills them in, from its contract."""

import tomllib
from pathlib import Path

STAGES = Path(__file__).resolve().parents[2] / "stages"


def defaults(stage, **changes):
    """Every parameter of the stage: its default, or what the test changes."""
    contract = tomllib.loads((STAGES / stage / "stage.toml").read_text())["parameters"]
    assert set(changes) <= set(contract), "a parameter that the contract does not have"
    return {name: described["default"] for name, described in contract.items()} | changes
