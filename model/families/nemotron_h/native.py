"""The native transformers class of NemotronH, loaded with every repair that makes it compute what the
checkpoint means.

Out of the box the class computes another function than the checkpoint's own code and vLLM, without a word:
- its mixers clamp dt at `time_step_min` (0.001); the checkpoint's code and vLLM do not clamp at all;
- loading in BF16 rounds A_log and D, which the checkpoint stores in float32;
- under autocast the router's logits fall to BF16, whose spacing at the size of a real correction bias (56.7)
  is 0.25, more than all of that bias's spread;
- transformers before 5.15.1 sums the inter-chunk states over the wrong axis (exact up to token 127, wrong
  after).
`load` repairs the first three and refuses the fourth.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from model.families.nemotron_h.names import FLOAT32, native
from model.layers import mamba
from model.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from model.layers.structure import Mamba

OLDEST = (5, 15, 1)  # transformers: the first release whose chunked scan carries its state right
ROUTER = "NemotronHTopkRouter"
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


class NativeError(RuntimeError):
    """The installed libraries or the model cannot do what was asked; the message says what would."""


@dataclass(frozen=True)
class Targets:
    """What LoRA is put on, in peft's words: module suffixes, and suffixes of the 3-D expert parameters."""

    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `peft.LoraConfig`."""
        found: dict[str, Any] = {"target_modules": list(self.target_modules)}
        return (
            {**found, "target_parameters": list(self.target_parameters)} if self.target_parameters else found
        )


def check_version(version: str) -> None:
    """Raises NativeError for a transformers release whose scan loses the state between chunks."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise NativeError(
            f"transformers {version} loses Mamba state between chunks of a sequence; install {oldest} or"
            " newer"
        )


def build(config: dict[str, Any]) -> nn.Module:
    """A freshly initialised model in float32 from a config.json in hub form, repaired."""
    import transformers

    check_version(transformers.__version__)
    return repair(transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**plain(config))))


def load(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """The model of a hub-layout checkpoint, in evaluation mode. For training it is loaded by
    model/assemble.py.
    """
    import transformers

    check_version(transformers.__version__)
    model = cast(nn.Module, transformers.NemotronHForCausalLM.from_pretrained(folder, dtype=dtype)).to(device)
    restore_float32(model, Checkpoint(folder))
    return repair(model).eval()


def repair(model: nn.Module) -> nn.Module:
    """Repairs a native model in place and returns it; a second call changes nothing. Raises NativeError if
    there is nothing to repair.
    """
    mixers = [cast("Mamba", module) for module in model.modules() if hasattr(module, "time_step_limit")]
    if not mixers and "linear_attention" in getattr(model.config, "layers_block_type", []):
        raise NativeError(
            "no mixer with a time_step_limit: this transformers release has another NemotronH than the repair"
            " knows"
        )
    for mixer in mixers:
        # of the class's own forward, which generation still takes
        mixer.time_step_limit = (0.0, float("inf"))
        mamba.attach(mixer)
    for module in model.modules():
        if type(module).__name__ == ROUTER:
            module.weight.data = module.weight.data.float()
            module.weight.requires_grad_(False)
            module.forward = types.MethodType(_without_autocast(type(module).forward), module)
    return model


def restore_float32(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Puts the tensors that the checkpoint holds in float32 back as they are on disk, whatever dtype the
    model was loaded in.
    """
    for name in checkpoint.entries:
        if name.rsplit(".", 1)[-1] in FLOAT32:
            path, attribute = native(name).rsplit(".", 1)
            module = model.get_submodule(path)
            old = getattr(module, attribute)
            value = checkpoint.tensor(name).to(device=old.device, dtype=torch.float32)
            setattr(
                module,
                attribute,
                nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value,
            )


def targets(model: nn.Module, preset: str) -> Targets:
    """What `preset` puts LoRA on in this model. Raises NativeError if any of it matches nothing."""
    if preset not in PRESETS:
        raise NativeError(f"there is no target preset {preset!r}; there are {', '.join(PRESETS)}")
    present = [name for named in (model.named_modules(), model.named_parameters()) for name, _ in named]
    wanted = PRESETS[preset]
    for suffix in (*wanted["target_modules"], *wanted["target_parameters"]):
        if not any(name.endswith("." + suffix) for name in present):
            raise NativeError(
                f"preset {preset!r} wants {suffix}, which this model does not have: choose another preset"
            )
    return Targets(wanted["target_modules"], wanted["target_parameters"])


def bytes_by_group(model: nn.Module) -> dict[str, dict[str, int]]:
    """Group -> {"bytes": held, "four_bit": of these in 4 bits, "trainable": parameters with a gradient}.

    Groups: embeddings, attention, mamba, experts (the routed stacks), shared, router, adapter, norms. This
    is what shows whether the experts are packed: bitsandbytes leaves them as they are without a word,
    since they are no Linears.
    """
    found: dict[str, dict[str, int]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        row = found.setdefault(group(name), {"bytes": 0, "four_bit": 0, "trainable": 0})
        row["bytes"] += tensor.numel() * tensor.element_size()
        if tensor.dtype == torch.uint8:
            row["four_bit"] += tensor.numel() * tensor.element_size()
        if getattr(tensor, "requires_grad", False):
            row["trainable"] += tensor.numel()
    return found


def group(name: str) -> str:
    """The parameter group of a native tensor name, with or without peft's prefixes."""
    if "lora_" in name:
        return "adapter"
    rules = [
        ("shared", r"\.shared_experts\."),
        ("experts", r"\.experts\."),
        ("router", r"\.gate\."),
        ("attention", r"\.[qkvo]_proj\."),
        ("mamba", r"\.mixer\."),
        ("embeddings", r"embeddings\.|lm_head\."),
    ]
    return next((label for label, rule in rules if re.search(rule, name)), "norms")


def _without_autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
    def router(self: nn.Module, hidden_states: torch.Tensor) -> Any:
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            return forward(self, hidden_states)

    return router


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A hub config without the keys that name remote code or repeat what the class knows."""
    return {
        key: value
        for key, value in config.items()
        if key
        not in (
            "auto_map",
            "architectures",
            "model_type",
            "transformers_version",
            "torch_dtype",
            "num_hidden_layers",
        )
    }
