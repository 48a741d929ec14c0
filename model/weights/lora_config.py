"""adapter_config.json of PEFT, and what it means for a merge.

Every field of `peft.LoraConfig` 0.21.2 is one of three kinds: this module reads it, it has no effect on a
merge, or it must have its default (`DEFAULTS`). Fields of the third kind, and fields that a newer PEFT may
add, are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.weights.paths import CheckpointError, member, printable, read_json

CONFIG = "adapter_config.json"

# Fields that this module reads.
UNDERSTOOD = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "use_dora",
        "init_lora_weights",
        "target_parameters",
        "modules_to_save",
    }
)
# How and where the adapter was trained, and on which modules. The names of its tensors say which modules, and
# stages/merge compares them with PEFT's reading. `bias` adds tensors that are compared with the base's.
NO_EFFECT = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "bias",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
    }
)
# Fields that change what the tensors mean, with PEFT's defaults.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "megatron_config": None,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_qalora": False,
    "monteclora_config": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "velora_config": None,
    "ensure_weight_tying": False,
}
# Initialisations that leave the base as it is. MiCA starts with A zero, "orthogonal" with B A zero, the
# others with B zero; `false` draws A and B at random and leaves the base alone too.
HARMLESS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Initialisations that PEFT's save_pretrained can convert to a plain LoRA afterwards.
CONVERTED = ("pissa", "olora", "corda", "lora_ga")

PLAIN = (
    "Train a plain LoRA, or merge with PEFT itself and give the merged checkpoint to stage base "
    "(source: folder)."
)
_REMEDIES = {
    "alora_invocation_tokens": (
        "An activated LoRA works only after its invocation tokens, so no merged "
        "weight stands for it. Serve it as an adapter, or train a plain LoRA."
    ),
    "trainable_token_indices": "It changes rows of the embeddings. Train without trainable_token_indices.",
    "layer_replication": "It builds another model, with layers repeated. Train without layer_replication.",
    "fan_in_fan_out": (
        "It is for Conv1D layers, of which this model has none: if PEFT loads the adapter, set it to false."
    ),
    "lora_bias": "This model's projections have no bias to merge it into. Train with lora_bias=False.",
    "kasa_config": "It changes the base. " + PLAIN,
}


class AdapterError(ValueError):
    """An adapter that cannot be merged: what was found, what was expected, what to do."""

    def __init__(
        self,
        found: str,
        expected: str = "an adapter of PEFT made on this base",
        remedy: str = "Train again on this base.",
    ):
        self.found, self.expected, self.remedy = printable(found), expected, remedy
        super().__init__(self.found)


@dataclass(frozen=True)
class LoraSettings:
    """The fields of adapter_config.json that a merge needs."""

    rank: int
    alpha: float
    rslora: bool
    dora: bool
    ranks: dict[str, int]
    alphas: dict[str, float]
    parameters: tuple[str, ...]  # target_parameters
    saved_modules: tuple[str, ...]  # modules_to_save

    @property
    def scale(self) -> float:
        """The scale of a module that no pattern names."""
        return self._scale(self.rank, self.alpha)

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Rank and scale of one module or parameter, by its name in PEFT."""
        rank = self.ranks.get(_pattern(self.ranks, module), self.rank)
        return rank, self._scale(rank, self.alphas.get(_pattern(self.alphas, module), self.alpha))

    def targeted(self, parameter: str) -> bool:
        """Whether target_parameters names this parameter: by its whole name, or by its end after a dot."""
        return any(parameter == name or parameter.endswith("." + name) for name in self.parameters)

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _pattern(patterns: dict[str, Any], module: str) -> str:
    """The first pattern that matches the end of a module's name, with the rule of
    `peft.utils.other.get_pattern_key`.
    """
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), "")


def adapter_folder(folder: Path) -> Path:
    """The folder that holds the adapter: `folder`, or its only subfolder with an adapter_config.json (PEFT
    saves a named adapter there).
    """
    if (folder / CONFIG).exists():
        return folder
    found = sorted(folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
    named = [member(folder, path.relative_to(folder).as_posix()).parent for path in found]
    if len(named) == 1:
        return named[0]
    if named:
        raise AdapterError(
            f"{folder.name} holds {len(named)} adapters: {', '.join(path.name for path in named)}",
            "one adapter",
            "Leave the folder of the adapter that you want, and move the others away.",
        )
    raise AdapterError(
        f"there is no {CONFIG} in {folder.name} or in a folder in it",
        "the folder that PEFT's save_pretrained writes",
        "Copy adapter_config.json and adapter_model.safetensors there.",
    )


def read(folder: Path) -> LoraSettings:
    """The settings of an adapter folder.

    Raises AdapterError if a merge would differ from PEFT's merge.
    """
    try:
        config = read_json(folder / CONFIG)
    except CheckpointError as error:
        raise AdapterError(
            error.found, "the file that PEFT's save_pretrained writes", "Copy it again."
        ) from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"peft_type in {CONFIG} is {kind!r}", "LORA", PLAIN)
    _check_initialisation(config.get("init_lora_weights", True))
    for name, value in config.items():
        if name in DEFAULTS:
            refused = value != DEFAULTS[name]
        else:  # of a newer PEFT; allowed if it is off or at the installed PEFT's default
            refused = (
                name not in UNDERSTOOD | NO_EFFECT
                and bool(value)
                and value != _installed_defaults().get(name)
            )
        if refused:
            raise AdapterError(
                f"{name} in {CONFIG} is {_short(value)}, which a merge does not support",
                f"{_short(DEFAULTS.get(name))}, its default",
                _REMEDIES.get(name, PLAIN),
            )
    return _settings(config)


def _settings(config: dict[str, Any]) -> LoraSettings:
    positive = "a number above zero"
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for name, value in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(value, dict):
            raise AdapterError(
                f"{name} in {CONFIG} is {_short(value)}",
                "an object of module names and numbers",
                "Copy the file again.",
            )
    for name, value in [("r", rank), *((f"rank_pattern[{key}]", value) for key, value in ranks.items())]:
        if type(value) is not int or value < 1:
            raise AdapterError(
                f"{name} in {CONFIG} is {_short(value)}",
                "a whole number of at least 1",
                "Copy the file again.",
            )
    for name, value in [
        ("lora_alpha", alpha),
        *((f"alpha_pattern[{key}]", value) for key, value in alphas.items()),
    ]:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise AdapterError(f"{name} in {CONFIG} is {_short(value)}", positive, "Copy the file again.")
    for key in (*ranks, *alphas):
        try:
            re.compile(key)
        except re.error as error:
            raise AdapterError(
                f"the pattern {key!r} in {CONFIG} is no regular expression: {error}",
                "one that PEFT can match",
                "Copy the file again.",
            ) from error
    lists = {}
    for name in ("target_parameters", "modules_to_save"):
        lists[name] = config.get(name) or []
        if not isinstance(lists[name], list) or not all(isinstance(value, str) for value in lists[name]):
            raise AdapterError(
                f"{name} in {CONFIG} is {_short(config[name])}", "a list of names", "Copy the file again."
            )
    return LoraSettings(
        rank,
        alpha,
        bool(config.get("use_rslora")),
        bool(config.get("use_dora")),
        ranks,
        alphas,
        tuple(lists["target_parameters"]),
        tuple(lists["modules_to_save"]),
    )


def _check_initialisation(value: Any) -> None:
    """Raises AdapterError if the initialisation changed the base, or may have."""
    word = value.lower() if isinstance(value, str) else value
    if any(word is known or (isinstance(word, str) and word == known) for known in HARMLESS) or value is None:
        return
    if isinstance(word, str) and word.startswith(CONVERTED):
        remedy = (
            "Load it with PEFT as it was trained and save it with save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...), "
            "which writes a plain LoRA for the base as it is."
        )
    else:
        remedy = PLAIN
    raise AdapterError(
        f"init_lora_weights in {CONFIG} is {_short(value)}: its training began by changing the base's "
        "weights, or may have",
        "a LoRA on the base as it is (true, false, gaussian, eva, orthogonal, mica)",
        remedy,
    )


def _installed_defaults() -> dict[str, Any]:
    """Field defaults of the installed LoraConfig; empty without PEFT."""
    try:
        import peft
    except ImportError:
        return {}
    return {key: value for key, value in peft.LoraConfig().to_dict().items() if not isinstance(value, set)}


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
