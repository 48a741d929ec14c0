"""LoRA adapters as PEFT writes them, read as changes to the tensors of a checkpoint in hub layout.

A linear's change is `scale * B @ A`, with A of shape (rank, in), B (out, rank) and scale = alpha / rank (alpha / sqrt(rank)
with rsLoRA). PEFT's wrapper of a stack of E experts keeps A as (E * rank, in), expert-major, and B as (out, rank * E),
rank-major: the change of expert e is `scale * B.reshape(out, rank, E)[:, :, e] @ A[e * rank : (e + 1) * rank]`. It wraps
up_proj first and down_proj around it, so `experts.base_layer.lora_*` belongs to up_proj and `experts.lora_*` to down_proj.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from nemotron.checkpoint import Checkpoint, CheckpointError, Tensors, header

_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
KEPT = 4  # tensors: A and B of both stacks of a layer
_STACKS = {"experts.base_layer": "up_proj", "experts": "down_proj"}


def summed(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """`weight + scale * b @ a`, summed in float32 and rounded once to the weight's dtype; a change of zeros gives every bit back.

    weight (rows, in), a (rank, in), b (rows, rank), the last two float32.
    """
    if not (a.any() and b.any()):
        return weight  # -0.0 + 0.0 would be 0.0
    return torch.addmm(weight.float(), b, a, alpha=scale).to(weight.dtype)


class AdapterError(ValueError):
    """An adapter that cannot be merged; the message names the tensor."""


@dataclass(frozen=True)
class Pair:
    """The two factors of one change. `expert` is an index into a stack of `experts`, or None for a plain linear."""

    a: str
    b: str
    expert: int | None = None
    experts: int = 0


class Adapter:
    """An adapter folder. `pairs` maps hub names to the factors of their change."""

    def __init__(self, folder: str | Path, base: Checkpoint):
        self.folder = Path(folder)
        self.config = json.loads((self.folder / "adapter_config.json").read_text())
        for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora"):
            if self.config.get(key):
                raise AdapterError(f"{key} in adapter_config.json is not supported: found {self.config[key]!r}, expected none")
        self.rank = self.config["r"]
        divisor = self.rank**0.5 if self.config.get("use_rslora") else self.rank
        self.scale = self.config["lora_alpha"] / divisor
        self.tensors = Tensors(header(self.folder / "adapter_model.safetensors")[0])
        self._read: dict[str, torch.Tensor] = {}
        self.pairs = self._pair(base)

    def _pair(self, base: Checkpoint) -> dict[str, Pair]:
        sides: dict[str, dict[str, str]] = {}
        for key in self.tensors.entries:
            if not (match := _KEY.match(key)):
                raise AdapterError(f"{key} is not a LoRA tensor that PEFT writes")
            sides.setdefault(match["module"], {})[match["side"]] = key
        pairs: dict[str, Pair] = {}
        for module, found in sides.items():
            if set(found) != {"A", "B"}:
                raise AdapterError(f"{module} has lora_{'/'.join(sorted(found))} only, expected both A and B")
            hub = re.sub(r"^model\.", "backbone.", module)
            stem, _, stack = hub.rpartition(".mixer.")
            if stack in _STACKS:
                names = [n for n in base.entries if re.fullmatch(re.escape(stem) + rf"\.mixer\.experts\.\d+\.{_STACKS[stack]}\.weight", n)]
                made = {n: Pair(found["A"], found["B"], int(n.split(".experts.")[1].split(".")[0]), len(names)) for n in names}
            else:
                made = {f"{hub}.weight": Pair(found["A"], found["B"])} if f"{hub}.weight" in base.entries else {}
            if not made:
                raise AdapterError(f"{module} of the adapter matches no tensor of the checkpoint; is it an adapter of another model?")
            pairs |= made
        for name, pair in pairs.items():
            if not name.endswith(("_proj.weight", "lm_head.weight")):
                raise AdapterError(f"the adapter changes {name}, expected projections and lm_head only")
            out, inside = base.entries[name].shape
            stacked = max(pair.experts, 1)
            expected = {pair.a: (self.rank * stacked, inside), pair.b: (out, self.rank * stacked)}
            for key, shape in expected.items():
                if self.tensors.entries[key].shape != shape:
                    raise AdapterError(f"{key} has shape {self.tensors.entries[key].shape}, expected {shape} for {name}")
        return pairs

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor of the adapter in float32. The last four are kept: the experts of a layer share them."""
        if key not in self._read:
            while len(self._read) >= KEPT:
                del self._read[next(iter(self._read))]
            self._read[key] = self.tensors.tensor(key).float()
        return self._read[key]

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank) of the change of one hub tensor, float32. Raises CheckpointError if one is not finite."""
        pair = self.pairs[name]
        a, b = self.tensor(pair.a), self.tensor(pair.b)
        if pair.expert is not None:
            a = a[pair.expert * self.rank : (pair.expert + 1) * self.rank]
            b = b.reshape(b.shape[0], self.rank, pair.experts)[:, :, pair.expert].contiguous()
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise CheckpointError(f"the adapter's change of {name} is not finite")
        return a, b

    def delta(self, name: str) -> torch.Tensor:
        """The change of one hub tensor, float32, in its shape (out, in)."""
        a, b = self.factors(name)
        return self.scale * (b @ a)

