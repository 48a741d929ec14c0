"""The errors for a config.json that cannot be used: of a model without a family, or with values that no model
has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")


class ConfigError(ValueError):
    """A config.json that cannot be used: what was found, what was expected, what to do."""

    def __init__(self, found: str, expected: str, remedy: str):
        super().__init__(f"found {found}; expected {expected}. {remedy}")
        self.found, self.expected, self.remedy = found, expected, remedy


class UnknownFamily(ConfigError):
    """A `model_type` without a family."""


def for_model_type(known: Mapping[str, Value], config: dict[str, Any]) -> Value:
    """The entry of `known` for the config's `model_type`. Raises UnknownFamily if there is none."""
    name = config.get("model_type")
    if isinstance(name, str) and name in known:
        return known[name]
    raise UnknownFamily(
        f"model_type {name!r} in config.json" if "model_type" in config else "no model_type in config.json",
        " or ".join(map(repr, known)),
        "Name a checkpoint of a model that this line knows; docs/architecture.md says how to add one.",
    )
