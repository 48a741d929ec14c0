"""NemotronH as a Family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from model.families.family import Config, Family, Spec
from model.families.nemotron_h import fields, layout, linears, names, operations, targets

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from model.layers.structure import Model

_BF16 = "A_log and D in F32, router in BF16, as in the BF16 repository"
_NVFP4 = "router in F32, A_log and D in BF16, as in NVIDIA's NVFP4 repository"
_PRECISIONS = {_BF16: names.FLOAT32, _NVFP4: names.FLOAT32_NVFP4}


def _in_precision(config: Config, precision: str) -> dict[str, Spec]:
    return names.tensors(config, _PRECISIONS[precision])


def _precision(dtypes: Mapping[str, str]) -> str:
    router = any(dtype == "F32" for name, dtype in dtypes.items() if name.endswith(".gate.weight"))
    return _NVFP4 if router else _BF16


def _kinds(config: Config) -> list[str]:
    return [names.LETTERS[letter] for letter in names.pattern(config)]


def _one_layer(config: Config, kind: str) -> Config:
    letter = next(letter for letter, name in names.LETTERS.items() if name == kind)
    return config | {"hybrid_override_pattern": letter, "num_hidden_layers": 1}


def _epsilon(config: Config) -> float:
    return float(config["layer_norm_epsilon"])


# The native class needs torch and transformers, which an audit's caller may not have loaded.


def _skeleton(config: Config) -> Model:
    from model.families.nemotron_h import native

    return native.skeleton(config)


def _load(folder: Path, dtype: torch.dtype) -> nn.Module:
    from model.families.nemotron_h import native

    return native.load(folder, dtype)


def _attach(model: nn.Module) -> None:
    from model.families.nemotron_h import native

    native.attach(model)


def _stored_exactly(name: str) -> bool:
    from model.families.nemotron_h import native

    return native.stored_exactly(name)


def _initial(name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    from model.families.nemotron_h import native

    return native.initial(name, shape)


NEMOTRON_H = Family(
    model_type="nemotron_h",
    check=fields.check,
    tensors=names.tensors,
    precisions=tuple(_PRECISIONS),
    in_precision=_in_precision,
    precision=_precision,
    never_cast=("e_score_correction_bias",),
    stored_exactly=_stored_exactly,
    linears=linears.linears,
    excludable=linears.excludable,
    kinds=_kinds,
    one_layer=_one_layer,
    native=names.native,
    hub=names.hub,
    layer=names.layer,
    in_layer=names.in_layer,
    embeddings=names.EMBEDDINGS,
    final_norm=names.FINAL_NORM,
    head=names.HEAD,
    epsilon=_epsilon,
    layouts=layout.LAYOUTS,
    quantised=layout.quantised,
    layout="nvidia",
    skeleton=_skeleton,
    load=_load,
    attach=_attach,
    group=names.group,
    initial=_initial,
    operations=operations.count,
    presets=tuple(targets.PRESETS),
    targets=targets.targets,
    targeted=targets.targeted,
)
