"""The model families, by the `model_type` of a config.json.

A family consists of three values, because each enters the keys of the stages that import it: `Family`
(tensors, names, layouts, the native class, adapters) for stages that train and convert weights; chat formats
(model/families/chat.py) for stages that render; serving flags (model/families/serve.py) for stages that
serve. So a new flag of vLLM makes no training run again.
"""

from __future__ import annotations

from typing import Any

from model.families.family import Family
from model.families.nemotron_h.family import NEMOTRON_H
from model.families.unknown import for_model_type

FAMILIES = {family.model_type: family for family in (NEMOTRON_H,)}


def of(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises UnknownFamily for any other `model_type`, and ConfigError for a
    value that no model of the family can have.
    """
    family = for_model_type(FAMILIES, config)
    family.check(config)
    return family
