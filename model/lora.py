"""LoRA adapters in PEFT's format, read as changes to the tensors of a checkpoint in hub layout.

A linear's change is `scale * B @ A`, with A of shape (rank, in), B (out, rank) and scale = alpha / rank
(alpha / sqrt(rank) with rsLoRA). DoRA then scales every row to the length in its magnitude vector. PEFT's
wrapper of a stack of E experts stores A as (E * rank, in), expert-major, and B as (out, rank * E),
rank-major. The change of expert e is `scale * B.reshape(out, rank, E)[:, :, e] @ A[e * rank : (e + 1) *
rank]`. PEFT wraps the parameters of a module in order, one wrapper around the other. If both stacks are
targeted, `experts.base_layer.lora_*` belongs to the first and `experts.lora_*` to the second. If one is
targeted, `experts.lora_*` belongs to it. `target_parameters` says which.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from model.families import registry
from model.families.family import Linear
from model.weights import lora_config
from model.weights.checkpoint import Checkpoint, Tensors, indexed
from model.weights.header import header
from model.weights.lora_config import CONFIG, AdapterError
from model.weights.paths import CheckpointError, member

__all__ = ["Adapter", "AdapterError", "Change", "Pair"]

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
INDEX = "adapter_model.safetensors.index.json"
_KEY = re.compile(
    r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>A|B|magnitude_vector)"
    r"(?:\.(?P<adapter>(?!bias$)[^.]+?))??(?:\.weight)?$"
)
_COPY = re.compile(
    r"^base_model\.model\.(?P<module>.+?)"
    r"(?:\.base_layer|\.original_module|\.modules_to_save"
    # no name of a wrapper: with two ways to read each, a search would never end
    r"(?:\.(?!(?:base_layer|original_module|modules_to_save)\.)[^.]+(?=\.))?)*"
    r"\.(?P<parameter>[^.]+)$"
)
KEPT = 6  # cached tensors: those that the experts of a layer share
ANOTHER = "is it an adapter of another model?"
SAME_BASE = "Give stage merge the base that the adapter was trained on."
SAVE_AGAIN = "Save the adapter again with PEFT's save_pretrained."


@dataclass(frozen=True)
class Pair:
    """The tensors of one change.

    `expert` is an index into a stack of `experts`, or None for a plain linear.
    """

    a: str
    b: str
    rank: int
    scale: float
    magnitude: str | None = None
    expert: int | None = None
    experts: int = 1


@dataclass(frozen=True)
class Change:
    """The change of one matrix, float32: A (rank, in), B (out, rank), and with DoRA the magnitude of every
    row, (out,).
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    @property
    def zero(self) -> bool:
        """Whether the change leaves every weight as it is."""
        return self.magnitude is None and not (self.a.any() and self.b.any())

    @property
    def finite(self) -> bool:
        parts = (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)
        return all(bool(torch.isfinite(tensor).all()) for tensor in parts)

    def rows(self, first: int, count: int) -> Change:
        """The change of rows `first` to `first + count`."""
        chosen = slice(first, first + count)
        return Change(
            self.a, self.b[chosen], self.scale, None if self.magnitude is None else self.magnitude[chosen]
        )

    def applied(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight (out, in) plus the change, float32, as PEFT computes it: `W + (B @ A) * scale`.

        With DoRA the result is multiplied by `magnitude / |W + (B @ A) * scale|`, the norm along each row
        (arXiv 2402.09353).
        """
        changed = weight.float() + (self.b @ self.a) * self.scale
        if self.magnitude is not None:
            changed = (self.magnitude / torch.linalg.norm(changed, dim=1)).view(-1, 1) * changed
        return changed

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """`applied`, rounded once to the weight's dtype. A zero change returns the weight bit for bit."""
        return weight if self.zero else self.applied(weight).to(weight.dtype)  # -0.0 + 0.0 would be 0.0


class Adapter:
    """An adapter folder. `pairs` maps hub names to the tensors of their change. `copies` are tensors of the
    base that the adapter also stores.

    Raises AdapterError if a merge would differ from PEFT's merge, and CheckpointError on a broken file.
    """

    def __init__(self, folder: str | Path, base: Checkpoint):
        self.folder = lora_config.adapter_folder(Path(folder))
        self.settings = lora_config.read(self.folder)
        self.rank, self.scale = self.settings.rank, self.settings.scale
        self.tensors = _tensors(self.folder)
        self._base, self.family = base, registry.of(base.config)
        # linears of the base, by hub name of their tensor
        self.linears = {x.weight: x for x in self.family.linears(base.config) if x.weight in base.entries}
        self._stacks: dict[str, list[Linear]] = {}  # by native name
        self._holders: dict[str, list[str]] = {}  # native name of a module -> its stacks, in their order
        for linear in self.linears.values():
            if linear.index is not None:
                self._stacks.setdefault(linear.module, []).append(linear)
        for stack in self._stacks:
            self._holders.setdefault(stack.rpartition(".")[0], []).append(stack)
        self._cache: dict[str, torch.Tensor] = {}
        self.pairs, self.copies = self._pairs_and_copies()
        for key in self.copies:
            self._check_copy(key)

    def _pairs_and_copies(self) -> tuple[dict[str, Pair], list[str]]:
        sides: dict[str, dict[str, str]] = {}
        adapters, copies = {}, []
        for key in self.tensors.entries:
            if match := _KEY.match(key):
                sides.setdefault(match["module"], {})[match["side"]] = key
                adapters[match["adapter"]] = key
            elif ".lora_" in key or not _COPY.match(key):
                raise AdapterError(
                    f"{key} is not a tensor that a merge knows",
                    "lora_A and lora_B of projections and lm_head",
                    "Train without LoRA on embeddings, convolutions and biases.",
                )
            else:
                copies.append(key)
        if len(adapters) > 1:
            first, second = list(adapters.values())[:2]
            raise AdapterError(
                f"{first} and {second} are of two adapters", "one adapter in the file", SAVE_AGAIN
            )
        if not sides:
            raise AdapterError("the adapter holds no LoRA tensor", "lora_A and lora_B", SAVE_AGAIN)
        for name in self.settings.saved_modules:
            if not any(f".{name}." in key for key in copies):
                raise AdapterError(
                    f"modules_to_save in {CONFIG} names {name}, of which no tensor is stored",
                    "its tensors",
                    SAVE_AGAIN,
                )
        pairs: dict[str, Pair] = {}
        for module, keys in sides.items():
            for name, pair in self._pairs_of_module(module, keys).items():
                if name in pairs:
                    raise AdapterError(
                        f"{pair.a} and {pairs[name].a} both change {name}",
                        "one change of each tensor",
                        SAVE_AGAIN,
                    )
                pairs[name] = pair
        return pairs, copies

    def _pairs_of_module(self, module: str, keys: dict[str, str]) -> dict[str, Pair]:
        """The changes by one module of the adapter, by hub name. `keys`: its tensors by kind."""
        self._check_kinds(module, keys)
        stack = self._stack_of(module) if module.removesuffix(".base_layer") in self._holders else None
        hub = f"{self.family.hub(module)}.weight"
        names = (
            [linear.weight for linear in self._stacks[stack]]
            if stack
            else [hub]
            if hub in self._base.entries
            else []
        )
        if not names:
            raise AdapterError(
                f"{module} of the adapter matches no tensor of the checkpoint; {ANOTHER}",
                "modules of this model",
                SAME_BASE,
            )
        if names[0] not in self.linears and names[0] != self.family.head:
            raise AdapterError(
                f"the adapter changes {names[0]}",
                "projections and lm_head only",
                "Train without this module among the targets.",
            )
        if stack and self.settings.dora:
            raise AdapterError(
                f"use_dora in {CONFIG} is true, and {module} is a stack of experts",
                "what PEFT takes: DoRA on linears only",
                lora_config.PLAIN,
            )
        rank, scale = self.settings.rank_and_scale(stack or module)
        out, inside = self._base.entries[names[0]].shape
        count = len(names) if stack else 1
        shapes = {"A": (rank * count, inside), "B": (out, rank * count), "magnitude_vector": (out,)}
        for side, key in keys.items():
            if (shape := self.tensors.entries[key].shape) != shapes[side]:
                raise AdapterError(
                    f"{key} has shape {shape}, expected {shapes[side]} for {names[0]}",
                    f"rank {rank}, as {CONFIG} says",
                    f"Copy {CONFIG} and the tensors again; or {ANOTHER}",
                )
        return {
            name: Pair(
                keys["A"],
                keys["B"],
                rank,
                scale,
                keys.get("magnitude_vector"),
                self.linears[name].index if stack else None,
                count,
            )
            for name in names
        }

    def _check_kinds(self, module: str, keys: dict[str, str]) -> None:
        expected = {"A", "B", "magnitude_vector"} if self.settings.dora else {"A", "B"}
        if missing := expected - keys.keys():
            raise AdapterError(
                f"{module} has lora_{' and lora_'.join(sorted(keys))} only",
                f"lora_{' and lora_'.join(sorted(missing))} too",
                "The file was cut or edited: copy it again.",
            )
        if extra := keys.keys() - expected:
            raise AdapterError(
                f"{keys[extra.pop()]} is there, and use_dora in {CONFIG} is not set",
                "the two files of one adapter",
                "Copy them again.",
            )

    def _stack_of(self, module: str) -> str:
        """The native name of the stack of experts that a wrapper of PEFT changes."""
        experts = module.removesuffix(".base_layer")
        # PEFT wraps stacks in this order
        targeted = [name for name in self._holders[experts] if self.settings.targeted(name)]
        if not targeted or (module != experts and len(targeted) == 1):
            raise AdapterError(
                f"the adapter has {module}, and target_parameters in {CONFIG} is "
                f"{list(self.settings.parameters)}",
                "target_parameters that name the stack of experts",
                f"The two are of different adapters: copy {CONFIG} again.",
            )
        return targeted[0] if module != experts else targeted[-1]

    def _check_copy(self, key: str) -> None:
        """Raises AdapterError unless a stored base tensor equals the base's own."""
        match = cast(re.Match[str], _COPY.match(key))  # as every key of `copies` does
        path = f"{match['module']}.{match['parameter']}"
        hub = self.family.hub(path)
        stack = self._stacks.get(path, [])
        names = [hub] if hub in self._base.entries else [linear.weight for linear in stack]
        if not names:
            raise AdapterError(
                f"{key} is not a tensor of the checkpoint; {ANOTHER}", "modules of this model", SAME_BASE
            )
        stored, shape = self.tensors.entries[key].shape, self._base.entries[names[0]].shape
        if stored != (shape if names == [hub] else (len(names), *shape)):
            raise AdapterError(
                f"{key} has shape {stored}, {names[0]} of the base has {shape}",
                "the base's tensor",
                "Train without resizing the vocabulary, and without modules_to_save.",
            )
        value = self.tensors.tensor(key)
        for name in names:
            stored_value = value if names == [hub] else value[self.linears[name].index]
            base_value = self._base.tensor(name)
            if not torch.equal(stored_value.to(base_value.dtype), base_value):
                raise AdapterError(
                    f"{key} differs from {name} of the base: it was trained, or is of another base",
                    "the base's values, since a merge adds LoRA alone",
                    f"Train without modules_to_save and bias. {SAME_BASE}",
                )

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor of the adapter in float32. The last few are cached, because the experts of a layer share
        them.
        """
        if key not in self._cache:
            while len(self._cache) >= KEPT:
                del self._cache[next(iter(self._cache))]
            self._cache[key] = self.tensors.tensor(key).float()
        return self._cache[key]

    def change(self, name: str) -> Change:
        """The change of one hub tensor. Raises CheckpointError if it is not finite."""
        pair = self.pairs[name]
        a, b = self.tensor(pair.a), self.tensor(pair.b)
        if pair.expert is not None:
            a = a[pair.expert * pair.rank : (pair.expert + 1) * pair.rank]
            b = b.reshape(b.shape[0], pair.rank, pair.experts)[:, :, pair.expert].contiguous()
        change = Change(a, b, pair.scale, self.tensor(pair.magnitude) if pair.magnitude else None)
        if not change.finite:
            raise CheckpointError(f"the adapter's change of {name} is not finite")
        return change

    def delta(self, name: str) -> torch.Tensor:
        """What a LoRA without DoRA adds to one hub tensor: float32 (out, in)."""
        change = self.change(name)
        return (change.b @ change.a) * change.scale


def _tensors(folder: Path) -> Tensors:
    """The tensors of an adapter folder: a safetensors file, or shards with an index. A pickle is refused:
    reading one safely depends on the version of PyTorch.
    """
    if member(folder, WEIGHTS).exists():
        return Tensors(header(folder / WEIGHTS)[0])
    if member(folder, INDEX).exists():
        return Tensors(indexed(folder, INDEX)[0])
    if (folder / PICKLED).exists():
        raise AdapterError(
            f"{PICKLED} is a pickle, which can run code and is never loaded",
            f"{WEIGHTS}, the safetensors file",
            "Load it with PEFT where you trust it, and save it with save_pretrained, which writes"
            " safetensors.",
        )
    raise AdapterError(
        f"there is no {WEIGHTS} beside {CONFIG}",
        "the folder that PEFT's save_pretrained writes",
        "Copy the file there.",
    )
