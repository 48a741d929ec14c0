"""What the user sees during training: progress, speed and memory."""

from __future__ import annotations

import resource

import torch

from stages import job
from stages.train.board import Board
from stages.train.loop import History


class Watch:
    """Progress, metrics and TensorBoard events of a run of `steps` steps. The speed is that of this process;
    an earlier attempt does not count.
    """

    def __init__(self, steps: int, device: str, board: Board):
        self.steps = steps
        self.device = device
        self.board = board
        self.tokens = 0
        self.seconds = 0.0

    def step(self, history: History, done: int, tokens: int, seconds: float) -> None:
        """Reports step `done`, which had `tokens` tokens and took `seconds`."""
        self.tokens += tokens
        self.seconds += seconds
        self.board.step(history, done)
        job.metric("loss", history.train[done], done)
        job.metric("speed", self.speed, done, "tokens/s")
        job.metric("memory", self.memory(), done, "bytes")
        job.progress(done, self.steps, "steps")

    def held_out(self, value: float, done: int) -> None:
        """Reports the held-out loss after step `done`."""
        self.board.held_out(value, done)
        job.metric("held-out loss", value, done)

    @property
    def speed(self) -> float:
        """Tokens per second in training steps, without evaluations and saves."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def memory(self) -> int:
        """Peak memory in bytes: of the GPU, including the pool of CUDA graphs, or of this process if there is
        no GPU.
        """
        if self.device == "cuda":
            return torch.cuda.max_memory_reserved()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
