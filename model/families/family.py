"""What a model family defines, as records. model/families/registry.py lists all families.

This module imports no library, so audits of a whole checkpoint start without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from model.layers.structure import Model

Config = dict[str, Any]  # a config.json in hub form


class FamilyError(RuntimeError):
    """The installed libraries or the model do not support a request; the message says what to do."""


@dataclass(frozen=True)
class Spec:
    """Shape and safetensors dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Linear:
    """One matrix (out, inside) of a model that can be adapted, packed and quantised.

    `name` is the hub name without `.weight`. `module` is the native class's module or stacked parameter that
    holds it, `part` the same within its layer's block. `index` is its position in a stack, None outside of
    one. Loaders fuse the linears of one `group` and need them quantised alike.
    """

    name: str
    kind: str
    layer: int
    module: str
    part: str
    index: int | None
    out: int
    inside: int
    group: str

    @property
    def weight(self) -> str:
        """The hub name of its tensor."""
        return f"{self.name}.weight"


@dataclass(frozen=True)
class Targets:
    """LoRA targets in PEFT's terms: suffixes of modules, and suffixes of the 3-D expert parameters."""

    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `peft.LoraConfig`."""
        arguments: dict[str, Any] = {"target_modules": list(self.target_modules)}
        return (
            {**arguments, "target_parameters": list(self.target_parameters)}
            if self.target_parameters
            else arguments
        )


@dataclass(frozen=True)
class Operations:
    """Operations for a document with T tokens, L of them trained: `token` * T + `square` * T^2 + `trained` *
    L.
    """

    token: int
    square: int
    trained: int

    def of(self, tokens: int, trained: int) -> int:
        """Operations of one document."""
        return self.token * tokens + self.square * tokens**2 + self.trained * trained


@dataclass(frozen=True)
class Family:
    """All that is specific to one `model_type`, except chat and serving (model/families/registry.py says
    why).

    Names are hub names unless they are called native. Callables raise ValueError or KeyError for a Config of
    another family.
    """

    model_type: str
    check: Callable[[Config], None]  # raises ConfigError for a value that no model has

    # Tensors and linears
    tensors: Callable[[Config], dict[str, Spec]]  # of the BF16 repository, in checkpoint order
    precisions: Sequence[str]  # descriptions of which tensors are F32; the BF16 repository's first
    in_precision: Callable[[Config, str], dict[str, Spec]]  # `tensors` in one of these
    precision: Callable[[Mapping[str, str]], str]  # of a checkpoint, by the dtype of each of its tensors
    never_cast: tuple[str, ...]  # endings of tensors whose values survive a change of dtype
    stored_exactly: Callable[[str], bool]  # native tensor -> whether a loaded model holds it in float32
    linears: Callable[[Config], tuple[Linear, ...]]  # in checkpoint order
    excludable: Callable[[Config], tuple[str, ...]]  # modules that an exclude list must name if unquantised
    kinds: Callable[[Config], list[str]]  # of each layer
    one_layer: Callable[[Config, str], Config]  # the same model with a single layer, of one kind

    # Names
    native: Callable[[str], str]  # hub to native; an expert's matrix to the stack that holds it
    hub: Callable[[str], str]  # native to hub, but for stacks
    layer: Callable[[str], int | None]  # index of a tensor's layer
    in_layer: Callable[[str, int], str]  # the name that a layer's tensor has in another layer
    embeddings: str
    final_norm: str
    head: str
    epsilon: Callable[[Config], float]  # of the final norm

    # Quantised checkpoints
    layouts: Mapping[str, str]  # name -> what it quantises
    quantised: Callable[[Config, str], list[Linear]]  # by one of these, in checkpoint order
    layout: str  # the one whose linears training may hold in 4 bits

    # The native class
    skeleton: Callable[[Config], Model]  # its weights on torch's default device; FamilyError if unfit
    load: Callable[[Path, torch.dtype], nn.Module]  # of a checkpoint, repaired, as transformers runs it
    attach: Callable[[nn.Module], None]  # repairs it and gives it our mixers, norms, experts and attention
    group: Callable[[str], str]  # the parameter group of a native tensor
    initial: Callable[[str, tuple[int, ...]], torch.Tensor | None]  # in random models; None: normal
    operations: Callable[[Config, bool], Operations]  # of a training step; whether blocks are recomputed

    # Adapters
    presets: Sequence[str]
    targets: Callable[[Config, str], Targets]  # of a preset; FamilyError if part of it matches nothing
    targeted: Callable[[Config, str], list[Linear]]  # the linears of a preset
