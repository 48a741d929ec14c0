"""The regular expressions of adapter_config.json. PEFT and model/lora.py search the names of the model's
modules with them. On some names a search would never end, so each is tried first, with a limit of time.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from model.families import registry
from model.weights import lora_config
from model.weights.lora_config import CONFIG
from model.weights.paths import read_json
from stages.job import StageError

SECONDS = 10.0  # of processor time, for one expression and all names; a sound one needs a tenth

# Field -> what PEFT 0.21.2 makes of one of its expressions (`peft.utils.other.get_pattern_key`,
# `peft.tuners.tuners_utils.check_target_module_exists`), as one that matches a whole name.
_ENDING, _LAYERS = r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(?P<idx>\d+)\..*"
_FORMS = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "rank_pattern": _ENDING,
    "alpha_pattern": _ENDING,
    "layers_pattern": _LAYERS,
}
_NAMES_IF_LISTED = ("target_modules", "exclude_modules")


class _TooSlow(Exception):
    """An expression was not tried on all names within SECONDS."""


def check(folder: Path, config: dict[str, Any]) -> None:
    """Raises StageError, which names the expression, if one in the adapter at `folder` is none, or is too
    slow on the names of the model of `config`. Raises AdapterError if the adapter's settings are refused.
    """
    folder = lora_config.adapter_folder(folder)
    lora_config.read(folder)
    expressions = list(_expressions(read_json(folder / CONFIG)))
    names = _names(config) if expressions else set()
    for field, text, form in expressions:
        try:
            expression = re.compile(form.format(text))
            with _limited():
                for name in names:
                    expression.fullmatch(name)
        except (re.error, OverflowError, RecursionError) as error:
            raise StageError(
                f"{text!r} of {field} in {CONFIG} is no regular expression: {error}",
                "one that PEFT can match",
                "Copy the file again.",
            ) from error
        except _TooSlow as error:
            raise StageError(
                f"{text!r} of {field} in {CONFIG} is no expression that ends: after {SECONDS:g} s it was not"
                f" tried on all {len(names)} names of the model",
                "one that takes milliseconds",
                "Write it without repetitions inside repetitions, such as (.*)*; or name the modules.",
            ) from error


def _expressions(settings: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Field, expression and PEFT's form of it, of every expression in the settings."""
    for field, form in _FORMS.items():
        value = settings.get(field)
        if isinstance(value, str):
            yield field, value, form
        elif isinstance(value, (list, dict)) and field not in _NAMES_IF_LISTED:
            yield from ((field, str(text), form) for text in value)


def _names(config: dict[str, Any]) -> set[str]:
    """Names of all modules and parameters, in the native class and in the hub's own."""
    family = registry.of(config)
    with torch.device("meta"):
        model = family.skeleton(config)
    native = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    paths = (accumulate(tensor.split("."), "{}.{}".format) for tensor in family.tensors(config))
    return native.union(*paths)


@contextmanager
def _limited() -> Iterator[None]:
    """Raises _TooSlow after SECONDS. Python's matcher looks for signals while it backtracks."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
