"""Stops a run that would continue without learning: an adapter without a gradient, an adapter that does not
change, or numbers that are not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stages.job import StageError
from stages.train.limits import LOOKED_AT


class Guard:
    """Refuses adapters that do not learn: after three steps every tensor must have had a gradient and must
    have changed.

    Libraries raise no error here. A kernel that reads a weight past its module leaves the adapter without a
    gradient, and the loss still falls.
    """

    def __init__(self, tensors: dict[str, nn.Parameter]):
        self.tensors, self.steps = tensors, 0
        self.touched: set[str] = set()
        self.start: dict[str, torch.Tensor] = {}

    def check_gradients(self, step: int) -> torch.Tensor:
        """The norm of all gradients. Called before the optimiser's step. Raises StageError with the tensor's
        name if a gradient is not finite.
        """
        if self.steps == 0:
            # on the CPU, because the estimate of GPU memory does not include this copy
            self.start = {name: p.detach().to("cpu", copy=True) for name, p in self.tensors.items()}
        gradients = {name: p.grad for name, p in self.tensors.items() if p.grad is not None}
        norm = nn.utils.get_total_norm(list(gradients.values()))
        if not torch.isfinite(norm):
            name = next(name for name, gradient in gradients.items() if not torch.isfinite(gradient.norm()))
            raise StageError(
                f"the gradient of {name} is not finite at step {step + 1}",
                "finite gradients",
                "Lower learning_rate or max_grad_norm",
            )
        if self.steps < LOOKED_AT:
            self.touched |= {name for name, gradient in gradients.items() if gradient.any()}
        return norm

    def check_movement(self) -> None:
        """Called after the optimiser's step. After the third step it raises StageError if a tensor has had no
        gradient or has not changed.
        """
        self.steps += 1
        if self.steps != LOOKED_AT:
            return
        idle = sorted(self.tensors.keys() - self.touched)
        still = sorted(
            name for name, p in self.tensors.items() if torch.equal(p.detach().cpu(), self.start[name])
        )
        self.start.clear()
        if names := idle or still:
            raise StageError(
                f"{len(names)} of {len(self.tensors)} adapter tensors"
                f" {'have no gradient' if idle else 'have not changed'} after {LOOKED_AT} steps, first"
                f" {names[0]}",
                "every adapter tensor to learn",
                "Something reads that weight past its adapter: choose other targets, and report it",
            )


@torch.no_grad()
def first_not_finite(model: nn.Module, forward: Callable[[], object]) -> str:
    """The name of the first module, in the order of the forward pass, whose output is not finite; "the loss"
    if there is none.
    """
    names: list[str] = []

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not names and isinstance(tensor, torch.Tensor) and not torch.isfinite(tensor).all():
                names.append(name)

        return hook

    handles = [
        module.register_forward_hook(hook_for(name))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return names[0] if names else "the loss"
