"""The families that there are, by the `model_type` of a config.json.

What a family says comes in three values, since each of them enters the keys of the stages that import it:
`Family` (tensors, names, layouts, the native class, adapters) that of whatever trains and converts weights;
chat formats (model/families/chat.py) and serving flags (model/families/serve.py) only those of the stages
that render or serve. So a new flag of vLLM trains nothing again.
"""

from __future__ import annotations

from typing import Any

from model.families.family import Family
from model.families.nemotron_h.family import NEMOTRON_H
from model.families.unknown import for_model_type

FAMILIES = {family.model_type: family for family in (NEMOTRON_H,)}


def of(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises UnknownFamily for any other `model_type`."""
    return for_model_type(FAMILIES, config)
