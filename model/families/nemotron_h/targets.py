"""Presets of linears that LoRA is put on."""

from __future__ import annotations

from model.families.family import Config, FamilyError, Linear, Targets
from model.families.nemotron_h.linears import linears

_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")},
    # Not out_proj: PEFT refuses to load an adapter on it, because the class's fused kernel reads its weight
    # directly, without calling the module.
    "mamba": {"target_modules": ("in_proj",)},
    "experts": {
        "target_modules": ("shared_experts.up_proj", "shared_experts.down_proj"),
        "target_parameters": ("mixer.experts.up_proj", "mixer.experts.down_proj"),
    },
}
PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    name: {
        kind: tuple(n for part in parts for n in _PARTS[part].get(kind, ()))
        for kind in ("target_modules", "target_parameters")
    }
    for name, parts in {
        "attention": ("attention",),
        "mamba": ("mamba",),
        "attention+mamba": ("attention", "mamba"),
        "experts": ("experts",),
        "all": ("attention", "mamba", "experts"),
    }.items()
}


def targets(config: Config, preset: str) -> Targets:
    """The LoRA targets of `preset` in a model of `config`. Raises FamilyError if one matches nothing."""
    if preset not in PRESETS:
        raise FamilyError(f"there is no target preset {preset!r}; there are {', '.join(PRESETS)}")
    suffixes, present = PRESETS[preset], {linear.module for linear in linears(config)}
    for suffix in (*suffixes["target_modules"], *suffixes["target_parameters"]):
        if not any(name.endswith(f".{suffix}") for name in present):
            raise FamilyError(
                f"preset {preset!r} wants {suffix}, which this model does not have: choose another preset"
            )
    return Targets(suffixes["target_modules"], suffixes["target_parameters"])


def targeted(config: Config, preset: str) -> list[Linear]:
    """The linears that `preset` puts LoRA on, in checkpoint order; parts that match nothing are skipped.
    Raises FamilyError for an unknown preset.
    """
    if preset not in PRESETS:
        raise FamilyError(f"there is no target preset {preset!r}; there are {', '.join(PRESETS)}")
    suffixes = tuple(f".{suffix}" for kind in PRESETS[preset].values() for suffix in kind)
    return [linear for linear in linears(config) if linear.module.endswith(suffixes)]
