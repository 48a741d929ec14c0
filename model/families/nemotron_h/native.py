"""The native transformers class of NemotronH, loaded with every repair that it needs to compute the
checkpoint's function.

Unrepaired the class silently computes another function than the checkpoint's own code and vLLM:

- its mixers clamp dt at `time_step_min` (0.001); the checkpoint's code and vLLM do not clamp at all;
- loading in BF16 rounds A_log and D, which the checkpoint stores in float32;
- under autocast the router's logits become BF16, whose spacing at the size of a real correction bias (56.7)
  is 0.25, more than all of that bias's spread;
- transformers before 5.15.1 sums the inter-chunk states over the wrong axis (exact up to token 127, wrong
  after).

`load` repairs the first three and refuses the fourth.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from model.families.family import Config, FamilyError
from model.families.nemotron_h.names import FLOAT32, native
from model.layers import attention, experts, mamba, norm
from model.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from model.layers.structure import Mamba, Model

OLDEST = (5, 15, 1)  # transformers: the first release whose chunked scan carries its state right
ROUTER, NORM = "NemotronHTopkRouter", "NemotronHRMSNorm"


def check_version(version: str) -> None:
    """Raises FamilyError for a transformers release whose scan loses the state between chunks."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise FamilyError(
            f"transformers {version} loses Mamba state between chunks of a sequence; install {oldest} or"
            " newer"
        )


def skeleton(config: Config) -> Model:
    """The class's own model of a config.json in hub form, initialised by transformers on torch's default
    device. Raises FamilyError if this transformers loses the state between chunks.
    """
    import transformers

    check_version(transformers.__version__)
    return cast(
        "Model", transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**class_config(config)))
    )


def build(config: Config) -> nn.Module:
    """A freshly initialised model in float32 from a config.json in hub form, repaired."""
    return repair(skeleton(config))


def load(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """The model of a hub-layout checkpoint, in evaluation mode. model/assemble.py loads it for training."""
    import transformers

    check_version(transformers.__version__)
    model = cast(
        nn.Module,
        transformers.NemotronHForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True
        ),
    ).to(device)
    restore_float32(model, Checkpoint(folder))
    return repair(model).eval()


def repair(model: nn.Module) -> nn.Module:
    """Repairs a native model in place and returns it; a second call changes nothing. Raises FamilyError if
    there is nothing to repair.
    """
    mixers = [cast("Mamba", module) for module in model.modules() if hasattr(module, "time_step_limit")]
    if not mixers and "linear_attention" in getattr(model.config, "layers_block_type", []):
        raise FamilyError(
            "no mixer with a time_step_limit: this transformers release has another NemotronH than the repair"
            " knows"
        )
    for mixer in mixers:
        # for the class's own forward, which generation still uses
        mixer.time_step_limit = (0.0, float("inf"))
        mamba.attach(mixer)
    for module in model.modules():
        if type(module).__name__ == ROUTER:
            module.weight.data = module.weight.data.float()
            module.weight.requires_grad_(False)
            module.forward = types.MethodType(_without_autocast(type(module).forward), module)
    return model


def attach(model: nn.Module) -> None:
    """Repairs a model and installs our mixers, norms, experts and attention. Its weights may be filled before
    or after.
    """
    repair(model)
    for module in model.modules():
        if type(module).__name__ == NORM:
            norm.attach(module)
    experts.register()
    attention.register()
    typed = cast("Model", model)
    typed.set_experts_implementation(experts.NAME)
    typed.set_attn_implementation(attention.NAME)


def stored_exactly(name: str) -> bool:
    """Whether a loaded model holds a native tensor in float32, whatever dtype it computes in."""
    path, _, last = name.rpartition(".")
    return last in FLOAT32 or path.endswith(".gate")


def initial(name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """A tensor's value in a model of random weights; None for normal random numbers."""
    module, _, last = name.rpartition(".")
    match last:
        case "A_log":
            return torch.arange(1, shape[0] + 1).float().log()
        case "D":
            return torch.ones(shape)
        case "dt_bias":
            return torch.full(shape, -3.0)
        case "e_score_correction_bias":
            return torch.zeros(shape)
    return torch.ones(shape) if "norm" in module.rpartition(".")[2] else None


def restore_float32(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Loads the checkpoint's float32 tensors again unrounded, whatever dtype the model was loaded in."""
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


def _without_autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
    def router(self: nn.Module, hidden_states: torch.Tensor) -> Any:
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            return forward(self, hidden_states)

    return router


def class_config(config: Config) -> Config:
    """A hub config without the keys that name remote code or repeat defaults of the class."""
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
