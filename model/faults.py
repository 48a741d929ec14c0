"""Single checks of a checkpoint, each a generator of findings. model/audit.py and model/checkpoint_audit.py
choose which of them to run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from model.families.family import Spec
from model.families.unknown import ConfigError
from model.layouts import PARTS
from model.weights import paths
from model.weights.checkpoint import INDEX, SINGLE, Checkpoint, weight_map
from model.weights.header import header
from model.weights.nvfp4 import GROUP
from model.weights.paths import CheckpointError, member
from model.weights.quant_config import ALGORITHMS, CONFIG, CONFIG_KEY, ONLY_IN_CONFIG, QuantConfig, covers

_AGAIN = "Copy or download it again."


@dataclass(frozen=True)
class Finding:
    """One fault: which tensor or file, what is there, what should be, what to do. What cannot be printed is
    escaped, since names and values are a stranger's.
    """

    subject: str
    found: str
    expected: str
    remedy: str

    def __post_init__(self) -> None:
        for name, text in vars(self).items():
            object.__setattr__(self, name, paths.printable(text))

    def __str__(self) -> str:
        return f"{self.subject}: found {self.found}; expected {self.expected}. {self.remedy}"

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def unreadable(subject: str, error: Exception) -> Finding:
    if isinstance(error, ConfigError | CheckpointError):
        return Finding(subject, error.found, error.expected, error.remedy)
    problem = f"no {error.args[0]} in config.json" if isinstance(error, KeyError) else str(error)
    return Finding(subject, problem, "a whole checkpoint with its config", _AGAIN)


def printable(name: str) -> str:
    """A tensor's name in a form that can be printed."""
    return name if name and name.isprintable() else ascii(name)


def files(folder: Path) -> Iterator[Finding]:
    """Finds shards that are missing, truncated or not named by the index, and tensors that lie in another
    file than the index says. Raises CheckpointError on a broken index.
    """
    index = weight_map(folder) if member(folder, INDEX).exists() else {}
    named = list(dict.fromkeys(index.values())) or [SINGLE]
    readable: set[str] = set()
    file_of: dict[str, str] = {}  # tensor -> the file that has it
    for file in named:
        if not (folder / file).is_file():
            yield Finding(
                file, "no such file", f"the shard that {INDEX} names" if index else "the weights", _AGAIN
            )
            continue
        try:
            entries, _ = header(folder / file)
        except (CheckpointError, OSError) as error:
            yield unreadable(file, error)
            continue
        readable.add(file)
        for name in entries:
            if name in file_of:
                yield Finding(
                    printable(name),
                    f"it in {file_of[name]} and in {file}",
                    "each tensor once",
                    "Which one is loaded depends on the loader: remove one.",
                )
            file_of[name] = file
    for name, file in index.items():
        if file in readable and file_of.get(name) != file:
            yield Finding(
                printable(name),
                f"it in {file_of[name]}" if name in file_of else "it in no file",
                f"it in {file}, as {INDEX} says",
                f"Write {INDEX} again, or that file.",
            )
    for name, file in file_of.items():
        if index and name not in index:
            yield Finding(
                printable(name),
                f"it in {file} and not in {INDEX}",
                "every tensor in the index",
                f"Write {INDEX} again.",
            )
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in named:
            yield Finding(
                path.name,
                f"a file that {INDEX if index else SINGLE} does not speak of",
                "no other safetensors file",
                "A loader may take it for a shard: move it away.",
            )


def structure(checkpoint: Checkpoint, expected: dict[str, Spec]) -> Iterator[Finding]:
    """Checks every tensor's name, dtype and shape. A linear that lacks all of its scales is one finding."""
    entries = checkpoint.entries
    for name, spec in expected.items():
        module, _, part = name.rpartition(".")
        entry = entries.get(name)
        if entry and (entry.dtype, entry.shape) == (spec.dtype, spec.shape):
            continue
        if entry:
            transposed = (
                len(entry.shape) == len(spec.shape) == 2
                and entry.shape != spec.shape
                and math.prod(entry.shape) == math.prod(spec.shape)
            )
            remedy = (
                "It is transposed: a linear is (out, in)."
                if transposed
                else "It belongs to another model or was written wrongly."
            )
            yield Finding(name, f"{entry.dtype} {entry.shape}", f"{spec.dtype} {spec.shape}", remedy)
        elif part not in PARTS:
            yield Finding(
                name,
                "no such tensor",
                f"{spec.dtype} {spec.shape}",
                "The checkpoint is incomplete: make or download it again.",
            )
        elif any(f"{module}.{sibling}" in entries for sibling in PARTS):
            yield Finding(
                name,
                "no such tensor",
                f"{spec.dtype} {spec.shape}",
                "vLLM does not miss a scale and computes with whatever memory holds: quantise again.",
            )
        elif part == PARTS[0]:
            yield Finding(
                module,
                "none of its scales",
                ", ".join(p for p in PARTS if f"{module}.{p}" in expected),
                "An expert that no token reached needs scales too: quantise again.",
            )
    for name in sorted(entries.keys() - expected.keys()):
        remedy = "A loader would stop at it or ignore it: remove it, or mend its name."
        if not name.isprintable():
            yield Finding(printable(name), "a control character in its name", "the model's own names", remedy)
        else:
            yield Finding(
                name, "a tensor that the config has no place for", "only the model's own tensors", remedy
            )


def _settings_key(config: QuantConfig) -> tuple[str, str | None, int, list[str]]:
    return config.algorithm, config.kv_cache, config.group_size, sorted(config.excludes)


def _summary(config: QuantConfig) -> str:
    return (
        f"{config.algorithm} with {len(config.excludes)} excludes, groups of {config.group_size} and KV cache"
        f" {config.kv_cache or 'as computed'}"
    )


def settings(configs: list[QuantConfig]) -> Iterator[Finding]:
    """Checks the quantisation settings against what vLLM reads, and against each other."""
    first = configs[0]
    for other in configs[1:]:
        if _settings_key(first) != _settings_key(other):
            yield Finding(
                other.file,
                _summary(other),
                f"what {first.file} says: {_summary(first)}",
                f"vLLM takes {first.file}: make them agree.",
            )
    if first.algorithm in ONLY_IN_CONFIG and first.file != CONFIG:
        yield Finding(
            first.file,
            f"quant_algo {first.algorithm}, and no {CONFIG_KEY} in {CONFIG}",
            f"these settings in {CONFIG}",
            f"Every vLLM refuses {first.algorithm} from {first.file}: add {CONFIG_KEY} to {CONFIG} (its form"
            " is in docs/formats.md), or quantise again.",
        )
    for config in configs:
        if config.missing:
            yield Finding(
                config.file,
                f"no {', '.join(config.missing)}",
                "the keys that vLLM asks for",
                "Add them; kv_cache_quant_algo may be null.",
            )
        if config.algorithm not in ALGORITHMS:
            yield Finding(
                config.file,
                f"quant_algo {config.algorithm}",
                " or ".join(ALGORITHMS),
                "This audit knows no other.",
            )
        if config.group_size != GROUP:
            yield Finding(
                config.file,
                f"group_size {config.group_size}",
                str(GROUP),
                f"NVFP4 has groups of {GROUP}: write that.",
            )


def excludes(
    checkpoint: Checkpoint, listed: Iterable[str], packed: set[str], config: QuantConfig
) -> Iterator[Finding]:
    """Checks the exclude list against the files, in both directions. Every module of `listed` that is not in
    `packed` must be excluded.
    """
    modules = [name.removesuffix(".weight") for name in checkpoint.entries if name.endswith(".weight")]
    for name in config.excludes:
        covered = [module for module in modules if covers(name, module)]
        wrong = [module for module in covered if module in packed]
        if not name.isprintable():
            yield Finding(
                config.file,
                f"the exclude {name!r}",
                "no control character",
                "vLLM would match nothing with it and quantise that layer: write the name out.",
            )
        elif not covered:
            yield Finding(
                config.file,
                f"the exclude {name}, which is no module of this checkpoint",
                "names of modules",
                "Mend or remove it.",
            )
        elif wrong:
            examples = (
                f" ({wrong[0]} and {len(wrong) - 1} more)"
                if wrong[1:]
                else ""
                if wrong == [name]
                else f" ({wrong[0]})"
            )
            yield Finding(
                config.file,
                f"the exclude {name}, which is quantised in the files{examples}",
                "excluded or quantised, not both",
                "Take it off the list.",
            )
    for module in listed:
        if module not in packed and not any(covers(exclude, module) for exclude in config.excludes):
            yield Finding(
                config.file,
                f"no exclude for {module}, which is not quantised",
                "an exclude for it",
                f"vLLM would read it as {config.algorithm}: add it.",
            )


def scales(checkpoint: Checkpoint, expected: dict[str, Spec]) -> Iterator[Finding]:
    """Checks that scales are finite and positive; those that `structure` finds no fault with, since one of
    another shape may be larger than the memory.
    """
    for name, entry in checkpoint.entries.items():
        if not name.endswith(PARTS) or expected.get(name) != Spec(entry.shape, entry.dtype):
            continue
        # 1.9 GB in the real model, so its bytes are checked: 1 to 126 are finite and positive
        if entry.dtype == "F8_E4M3":
            low, high = checkpoint.tensor(name).reshape(-1).view(torch.uint8).aminmax()
            if low > 0 and high < 127:
                continue
        values = checkpoint.tensor(name).float()
        if not torch.isfinite(values).all():
            yield Finding(
                name,
                "NaN or infinity",
                "finite scales",
                "Quantise again; if it stays, the calibration met such values.",
            )
        elif not (values > 0).all():
            yield Finding(
                name,
                f"{int((values <= 0).sum())} scales that are not positive",
                "positive scales",
                "Quantise again; a zero scale erases its group.",
            )


def unchanged(
    checkpoint: Checkpoint, source: Checkpoint, names: Iterable[str], never_cast: tuple[str, ...]
) -> Iterator[Finding]:
    """Checks that tensors have the same bits in `source`: those of `names` that both hold in one dtype, and
    those whose name ends in `never_cast` in any dtype.
    """
    for name in names:
        entry, source_entry = checkpoint.entries.get(name), source.entries.get(name)
        if entry is None:
            continue  # reported by `structure`
        if source_entry is None or source_entry.shape != entry.shape:
            yield Finding(
                name,
                f"{source_entry.shape if source_entry else 'no such tensor'} in the source",
                f"{entry.shape}",
                "The source is another model: name what this was made from.",
            )
        elif (source_entry.dtype != entry.dtype and name.endswith(never_cast)) or (
            source_entry.dtype == entry.dtype and not checkpoint.same_bits(name, source)
        ):
            yield Finding(
                name,
                "other values than in the source",
                "the same bits",
                "It must be copied, not cast: quantise again.",
            )


def not_finite(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[Finding]:
    for name in names:
        tensor = checkpoint.tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            yield Finding(
                name,
                "NaN or infinity",
                "finite values",
                "The checkpoint is damaged or its training diverged: do not build on it.",
            )
