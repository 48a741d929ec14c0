"""LoRA on a model's Projections, stored on disk in PEFT's format.

PEFT, vLLM and stage merge read the same folder (model/lora.py describes its tensors). PEFT wraps a stack of
experts once: A (E * rank, in) is expert-major, B (out, rank * E) rank-major. The wrapper of a module's first
stack lies inside the wrapper of its second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.families import registry
from model.layers.projection import Projection
from model.weights.origin import Origin

if TYPE_CHECKING:
    from model.layers.structure import Model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


def attach(model: Model, preset: str, rank: int, alpha: float, seed: int) -> None:
    """Gives LoRA factors to the linears that `preset` names, in the model's order.

    Raises FamilyError if part of the preset matches nothing.
    """
    family = registry.of(model.hub_config)
    family.targets(model.hub_config, preset)
    chosen = {linear.module for linear in family.targeted(model.hub_config, preset)}
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, Projection) and name in chosen:
            module.adapt(rank, alpha, generator)


def adapted(model: nn.Module) -> dict[str, Projection]:
    """Name -> Projection, of every Projection that has LoRA factors."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Projection) and module.rank
    }


def state(model: Model) -> dict[str, torch.Tensor]:
    """The factors with PEFT's names and layout, float32 on the CPU."""
    tensors, peft_name = {}, peft_names(model)
    for name, module in adapted(model).items():
        a, b = module.lora_a.detach().float().cpu(), module.lora_b.detach().float().cpu()
        tensors[f"{peft_name[name]}.lora_A.weight"] = a.flatten(0, 1).contiguous()
        tensors[f"{peft_name[name]}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1).contiguous()
    return tensors


@torch.no_grad()
def restore(model: Model, tensors: dict[str, torch.Tensor]) -> None:
    """Loads tensors that `state` returned. Raises ValueError if they belong to another adapter."""
    peft_name = peft_names(model)
    expected = {f"{peft_name[name]}.lora_{side}.weight" for name in adapted(model) for side in "AB"}
    if expected != tensors.keys():
        raise ValueError(
            f"an adapter with other tensors: {sorted(expected ^ tensors.keys())[0]} is in one of the two only"
        )
    for name, module in adapted(model).items():
        a, b = (tensors[f"{peft_name[name]}.lora_{side}.weight"] for side in "AB")
        for factor, value in zip(
            (module.lora_a, module.lora_b), _by_expert(a, b, module, module.rank), strict=True
        ):
            factor.copy_(value)


def save(
    model: Model, folder: Path, preset: str, rank: int, alpha: float, base: Origin | None = None
) -> None:
    """Writes the folder that PEFT reads, which names the `base`. The same factors give the same bytes, and no
    path of this machine is in it.
    """
    import peft

    folder.mkdir(parents=True, exist_ok=True)
    save_file(state(model), folder / WEIGHTS, metadata={"format": "pt"})
    chosen = registry.of(model.hub_config).targets(model.hub_config, preset)
    peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides by the rank: any number will do
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base.repository if base else None,
        revision=base.commit if base else None,
        **chosen.arguments(),
    ).save_pretrained(str(folder))
    config = json.loads((folder / CONFIG).read_text())
    config["target_modules"].sort()  # a set in peft, so in another order in every process
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(model: Model, folder: Path) -> None:
    """Loads the factors of a folder, as `restore` does."""
    restore(model, load_file(folder / WEIGHTS))


def _by_expert(
    a: torch.Tensor, b: torch.Tensor, module: Projection, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's A (experts * rank, in) and B (out, rank * experts) as (experts, rank, in) and (experts, out,
    rank).
    """
    return a.view(module.experts, rank, -1), b.view(module.out_features, rank, module.experts).permute(
        2, 0, 1
    )


def peft_names(model: Model) -> dict[str, str]:
    """Native name of each linear and stack -> the name of its PEFT wrapper, without `.lora_A.weight` and
    `.lora_B.weight`. Assumes that all stacks of a module are adapted.
    """
    wrappers: dict[str, str] = {}
    stacks: dict[str, list[str]] = {}  # module -> the stacks that are its parameters, in their order
    for linear in model.linears.values():
        if linear.index is None:
            wrappers[linear.module] = _PREFIX + linear.module
        elif not linear.index:
            stacks.setdefault(linear.module.rpartition(".")[0], []).append(linear.module)
    for module, names in stacks.items():
        for outer, stack in enumerate(reversed(names)):  # PEFT wraps them in their order
            wrappers[stack] = _PREFIX + module + ".base_layer" * outer
    return wrappers
