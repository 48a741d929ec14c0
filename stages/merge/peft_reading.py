"""An adapter as PEFT itself reads it: a second reader that shares no code with model/lora.py.

PEFT builds its wrappers on the model's class with weights that take no memory, so this takes a second for any
model size. Then it loads the adapter one layer at a time, and PEFT's own code computes each changed matrix:
`Linear.merge` for a linear, `get_delta_factors` for a stack of experts (PEFT's own merge would make three
float32 copies of the stack).
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.families import registry
from model.weights.checkpoint import Tensors
from stages.job import StageError

_NAME = "default"
_PREFIX = "base_model.model."
# The adapter's name in a key. PEFT's save_pretrained leaves it out; the key of a magnitude ends before it.
_ADAPTER_NAME = re.compile(r"(?<=lora_[AB])[.][^.]+(?=[.]weight$)|(?<=lora_magnitude_vector)[.].*$")
ONLY_PEFT = "Merge with PEFT itself to see why, and save the adapter again with its save_pretrained."


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """One LoRA layer of PEFT.

    `stack` is the native name of the stack of experts that it changes; None for a linear.
    """

    path: str
    layer: Any  # a LoraLayer of PEFT; mypy would take its parts for Tensor | Module
    stack: str | None


class PeftReading:
    """An adapter as PEFT reads it.

    `wrappers` maps the hub name of every tensor that PEFT would change to its LoRA layer. `absent` lists the
    tensors that the adapter's configuration names but does not store; PEFT leaves them unchanged.
    """

    def __init__(self, folder: Path, tensors: Tensors, config: dict[str, Any], device: str = "cpu"):
        """`folder` holds adapter_config.json, `tensors` are the adapter's, `config` is the base's.

        Raises StageError if PEFT refuses the adapter or would ignore one of its tensors.
        """
        import peft

        self.version, self._tensors, self._device = peft.__version__, tensors, device
        self._lora_keys = [key for key in tensors.entries if ".lora_" in key]
        self._family = registry.of(config)
        self._linears = {linear.weight: linear for linear in self._family.linears(config)}
        modules = (key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in self._lora_keys)
        hub_class = any(self._family.native(module) != module for module in modules)
        with warnings.catch_warnings():
            # PEFT warns of missing keys, and of layers whose model it does not know.
            warnings.simplefilter("ignore")
            try:
                # model/lora.py compares the modules that are stored whole with the base.
                settings = dataclasses.replace(
                    peft.PeftConfig.from_pretrained(str(folder)), modules_to_save=None, inference_mode=True
                )
                model = _weightless(self._hub_class(config) if hub_class else _native_class(config), device)
                self._model = peft.PeftModel(model, settings, low_cpu_mem_usage=True)
            except (
                ValueError,
                TypeError,
                RuntimeError,
                KeyError,
                NotImplementedError,
                AttributeError,
            ) as error:
                raise StageError(
                    f"PEFT {peft.__version__} refuses the adapter: {error}", "one that PEFT loads", ONLY_PEFT
                ) from error
        self.wrappers = dict(self._wrappers())
        self._keys: dict[str, list[str]] = {}  # path of a wrapper -> keys of its tensors
        paths = {wrapper.path for wrapper in self.wrappers.values()}
        for key in self._lora_keys:
            path = key.rpartition(".lora_")[0]
            if path not in paths:
                raise StageError(
                    f"PEFT would leave {key} out: target_modules and target_parameters do not name its "
                    "module",
                    "the two files of one adapter",
                    "Copy adapter_config.json again; it is not of this adapter, or was edited.",
                )
            self._keys.setdefault(path, []).append(key)
        self.absent = sorted(
            name for name, wrapper in self.wrappers.items() if wrapper.path not in self._keys
        )
        if self.absent and settings.init_lora_weights is False:
            raise StageError(
                f"the adapter stores nothing for {self.absent[0]} and {len(self.absent) - 1} more tensors "
                "that its configuration names",
                "tensors for all of them, since init_lora_weights: false begins with a change",
                "Copy the adapter again.",
            )
        self.wrappers = {
            name: wrapper for name, wrapper in self.wrappers.items() if wrapper.path in self._keys
        }

    def _wrappers(self) -> Iterator[tuple[str, Wrapper]]:
        """Hub name and wrapper of every tensor that PEFT would change."""
        from peft.tuners.lora import LoraLayer

        stacks: dict[str, list[str]] = {}
        for name, linear in self._linears.items():
            if linear.index is not None:
                stacks.setdefault(linear.module, []).append(name)
        for path, layer in self._model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            parameter, plain = getattr(layer, "parameter_name", None), path.removeprefix(_PREFIX)
            if parameter and parameter != "weight":
                stack = f"{re.sub(r'([.]base_layer)+$', '', plain)}.{parameter}"
                for name in stacks.get(stack, []):
                    yield name, Wrapper(path, layer, stack)
            else:
                yield f"{self._family.hub(plain)}.weight", Wrapper(path, layer, None)

    def _hub_class(self, config: dict[str, Any]) -> nn.Module:
        """A model of linears with the names of the hub's own class, which has one module per expert."""
        shapes: dict[str, tuple[int, ...]] = {
            name: (linear.out, linear.inside) for name, linear in self._linears.items()
        }
        shapes[self._family.head] = self._family.tensors(config)[self._family.head].shape
        root = nn.Module()
        for name, (out, inside) in shapes.items():
            *path, last, _ = name.split(".")
            module = root
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.add_module(last, nn.Linear(inside, out, bias=False, device="meta"))
        return root

    @contextmanager
    def loaded(self, tensors: list[str]) -> Iterator[None]:
        """Loads PEFT's factors of these hub tensors in float32, and drops them when the context ends."""
        import peft

        paths = {self.wrappers[name].path: self.wrappers[name].layer for name in tensors}
        keys = [key for path in paths for key in self._keys[path]]
        # PEFT expects the names of the file, which do not contain the adapter's name.
        state = {
            _ADAPTER_NAME.sub("", key): self._tensors.tensor(key).float().to(self._device) for key in keys
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result: Any = peft.set_peft_model_state_dict(
                self._model, state, adapter_name=_NAME, low_cpu_mem_usage=True
            )
        if result.unexpected_keys:
            raise StageError(
                f"PEFT does not know where {result.unexpected_keys[0]} belongs",
                "tensors that PEFT loads",
                ONLY_PEFT,
            )
        try:
            yield
        finally:
            for layer in paths.values():
                for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                    part.to("meta")

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A (rank, in) and scale * B (out, rank) of one loaded change; None for DoRA, whose change is not a
        product.
        """
        wrapper = self.wrappers[name]
        layer = wrapper.layer
        if wrapper.stack:
            stacked_b, stacked_a, scale = layer.get_delta_factors(_NAME)
            expert = self._linears[name].index
            return stacked_a[expert], stacked_b[expert] * scale
        return (
            None
            if layer.use_dora[_NAME]
            else (layer.lora_A[_NAME].weight.data, layer.lora_B[_NAME].weight.data * layer.scaling[_NAME])
        )

    @torch.no_grad()
    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight (out, in) of one loaded hub tensor with PEFT's change, float32."""
        wrapper = self.wrappers[name]
        layer, weight = wrapper.layer, weight.to(self._device, torch.float32)
        if wrapper.stack:
            stacked_b, stacked_a, scale = layer.get_delta_factors(_NAME)
            expert = self._linears[name].index
            change: torch.Tensor = (stacked_b[expert] @ stacked_a[expert]) * scale
            return weight + change  # multiplied in the order of PEFT's get_delta_weight
        if type(layer).__name__ == "ParamWrapper":
            change = (layer.lora_B[_NAME].weight @ layer.lora_A[_NAME].weight) * layer.scaling[_NAME]
            return weight + change
        holder = layer.get_base_layer()
        before = holder.weight
        holder.weight = nn.Parameter(weight, requires_grad=False)
        try:
            layer.merge(safe_merge=True, adapter_names=[_NAME])
            merged: torch.Tensor = holder.weight.data
            return merged
        finally:
            holder.weight = before
            layer.merged_adapters.clear()


def _weightless(model: nn.Module, device: str) -> nn.Module:
    """The model with every weight replaced by one expanded zero. PEFT moves what it loads to the device of
    that zero.
    """
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            setattr(
                module,
                name,
                nn.Parameter(
                    torch.zeros((), dtype=torch.float32, device=device).expand(value.shape),
                    requires_grad=False,
                ),
            )
    return model


def _native_class(config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return registry.of(config).skeleton(config)
