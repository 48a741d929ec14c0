"""What is watched while the Trainer runs: progress, the loss, the seal of checkpoints, and whether every adapter learns."""

from __future__ import annotations

import math
import time

import torch
from transformers import TrainerCallback

from stages import job
from stages.train import checkpoints


class Watch(TrainerCallback):
    """Tells the caller how far training is, and stops it when the loss is no longer a number."""

    def __init__(self, tokens: int):
        self.tokens, self.began, self.first = tokens, 0.0, 0

    def on_train_begin(self, args, state, control, **_):
        self.began, self.first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **_):
        for key, name in (("loss", "loss"), ("eval_loss", "held-out loss")):
            if key not in (logs or {}):
                continue
            if not math.isfinite(logs[key]):
                raise job.StageError(f"{name} is {logs[key]} at step {state.global_step}", "a finite loss", "Lower learning_rate or max_grad_norm")
            job.metric(name, logs[key], state.global_step)
        if "loss" in (logs or {}):
            steps, seconds = state.global_step - self.first, time.monotonic() - self.began
            left = seconds / steps * (state.max_steps - state.global_step)
            speed = self.tokens * steps / seconds
            job.progress(state.global_step, state.max_steps, "steps", f"loss {logs['loss']:.3f}, {speed:,.0f} tokens/s, {left:.0f} s left")

    def on_save(self, args, state, control, **_):
        from pathlib import Path

        checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class Learning(TrainerCallback):
    """Refuses adapters that do not learn: after three steps every tensor has had a gradient and has moved.

    Three, since B starts at zero and blocks A's gradient on the first, and the warm-up may begin at a rate of zero.
    Libraries do not raise here: peft only warns that a parameter was not matched, or trains a tensor that nothing reads.
    """

    def __init__(self, model: torch.nn.Module):
        self.tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.start: dict[str, torch.Tensor] = {}
        self.moved_by_gradient: set[str] = set()
        self.steps = 0

    def on_train_begin(self, args, state, control, **_):
        self.start = {name: p.detach().clone() for name, p in self.tensors.items()}  # now, since a resumed run has just loaded them

    def on_pre_optimizer_step(self, args, state, control, **_):
        if self.steps < 3:
            self.moved_by_gradient |= {name for name, p in self.tensors.items() if p.grad is not None and bool(p.grad.any())}

    def on_step_end(self, args, state, control, **_):
        self.steps += 1
        if self.steps != 3:
            return
        idle = sorted(self.tensors.keys() - self.moved_by_gradient)
        still = sorted(name for name, p in self.tensors.items() if torch.equal(p.detach(), self.start[name]))
        self.start.clear()
        if idle or still:
            names = idle or still
            raise job.StageError(
                f"{len(names)} of {len(self.tensors)} adapter tensors {'have no gradient' if idle else 'have not changed'} after 3 steps, first {names[0]}",
                "every adapter tensor to learn", "A kernel or a quantised layer bypasses that module: choose other targets or method lora",
            )
