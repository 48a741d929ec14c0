"""Every linear of a NemotronH model, as records (model/families/family.py, Linear).

No other module reads the suffixes of linears' names.
"""

from __future__ import annotations

from model.families.family import Config, Linear
from model.families.nemotron_h import names

MAMBA, ATTENTION, EXPERT, SHARED = "mamba", "attention", "expert", "shared expert"
_FUSED = ("q_proj", "k_proj", "v_proj")  # vLLM loads these as one, and the experts of a layer


def linears(config: Config) -> tuple[Linear, ...]:
    """All linears of a config, in checkpoint order. lm_head is not among them, because nothing packs it."""
    return tuple(
        _linear(name.removesuffix(".weight"), *spec.shape)
        for name, spec in names.tensors(config).items()
        if name.endswith("_proj.weight")
    )


def excludable(config: Config) -> tuple[str, ...]:
    """Modules that an exclude list must name if they are not quantised, in checkpoint order: linears,
    convolutions and lm_head. Loaders do not treat the router as a linear layer.
    """
    modules = (name.removesuffix(".weight") for name in names.tensors(config) if name.endswith(".weight"))
    return tuple(m for m in modules if m.endswith(("_proj", ".conv1d")) or m == _HEAD)


_HEAD = names.HEAD.removesuffix(".weight")


def _linear(name: str, out: int, inside: int) -> Linear:
    parent, _, last = name.rpartition(".")
    module, number, index = names.native(name), names.layer(name), names.expert(name)
    assert number is not None  # every linear is in a layer
    if index is not None:
        kind, group = EXPERT, module.rpartition(".")[0]
    elif parent.endswith(".shared_experts"):
        kind, group = SHARED, module
    elif last in ("in_proj", "out_proj"):
        kind, group = MAMBA, module
    else:
        kind, group = ATTENTION, f"{parent}.qkv" if last in _FUSED else module
    part = module.removeprefix(f"{names.block(number)}.")
    return Linear(name, kind, number, module, part, index, out, inside, group)
