"""Registry of chat formats: how each family renders conversations.

Separate from model/families/registry.py, so that a change to a model's weights renders no data set again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.families.unknown import for_model_type
from model.labels import IGNORED


@dataclass(frozen=True)
class Rendered:
    """`input_ids` and `labels` have one entry per token; untrained tokens have the label IGNORED."""

    text: str
    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Chat:
    """One family's chat format.

    `render` makes text, tokens and labels from messages and tools. Its other arguments are the tokenizer and
    whether thoughts are trained. It raises ChatError (model/families/messages.py) for conversations that
    cannot be trained on.
    """

    model_type: str
    render: Callable[[Any, list[dict[str, Any]], list[dict[str, Any]] | None, bool], Rendered]


def of(config: dict[str, Any]) -> Chat:
    """The chat format of a config.json's family. Raises UnknownFamily for any other `model_type`."""
    from model.families.nemotron_h.chat import NEMOTRON_H

    return for_model_type({chat.model_type: chat for chat in (NEMOTRON_H,)}, config)


def of_folder(checkpoint: Path) -> Chat:
    """`of` the config.json of a checkpoint folder."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return of(config)
