"""What LoRA is put on: presets of linears."""

from __future__ import annotations

from model.families.family import Config, FamilyError, Linear, Targets
from model.families.nemotron_h.linears import linears

_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")},
    # Not out_proj: peft refuses to load an adapter on it, since the class's own fused kernel reads its weight
    # past the module.
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
    """What `preset` puts LoRA on in a model of `config`. Raises FamilyError if any of it matches nothing."""
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
    """The linears that `preset` puts LoRA on, in checkpoint order; none of what the model does not have.
    Raises FamilyError for an unknown preset.
    """
    if preset not in PRESETS:
        raise FamilyError(f"there is no target preset {preset!r}; there are {', '.join(PRESETS)}")
    suffixes = tuple(f".{suffix}" for kind in PRESETS[preset].values() for suffix in kind)
    return [linear for linear in linears(config) if linear.module.endswith(suffixes)]
