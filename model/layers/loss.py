"""The loss on trained tokens only, and the logits of these tokens only.

With a vocabulary of 131,072 the logits of 16,384 tokens take 8.6 GB in float32, and three quarters of them
belong to untrained tokens. Here logits are formed for trained tokens, a chunk at a time. Each chunk's
gradient is computed while its logits exist, so no logits are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from model.labels import IGNORED

CHUNK = 1024  # tokens whose logits are held: 0.5 GB in float32 at the real vocabulary


def trained_targets(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions whose next token is trained, and these next tokens: int64, both (n,). `labels`: (tokens,),
    one sequence.

    A document's first label is always ignored, because no token precedes it. So no document predicts the next
    one.
    """
    targets = labels[1:]
    positions = (targets != IGNORED).nonzero()[:, 0]
    return positions, targets[positions]


def cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk: int = CHUNK
) -> torch.Tensor:
    """The sum, not the mean, over tokens of -log p(target): float32 scalar. The caller divides by the step's
    tokens.

    `hidden` (n, hidden size), `head` (vocabulary, hidden size) frozen, `targets` int64 (n,). Log-softmax in
    float32.
    """
    return _CrossEntropy.apply(hidden, head, targets, chunk)


class _CrossEntropy(torch.autograd.Function):
    apply: ClassVar[Callable[..., torch.Tensor]]

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), chunk):
            rows, chunk_targets = hidden[start : start + chunk], targets[start : start + chunk]
            logits = (rows @ head.t()).float()
            total += F.cross_entropy(logits, chunk_targets, reduction="sum")
            if gradient is not None:
                # softmax minus one-hot: the derivative of the sum by the logits
                logits = logits.softmax(-1)
                logits[torch.arange(len(chunk_targets), device=chunk_targets.device), chunk_targets] -= 1
                gradient[start : start + chunk] = logits.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * g, None, None, None


def likeliest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` likeliest tokens of each row of logits (n, vocabulary): index int64 (n, count), and float32
    (n, count + 1) their log-probabilities and, last, that of all others together.
    """
    logs = logits.float().log_softmax(-1)
    top = logs.topk(count)
    return top.indices, torch.cat([top.values, _others(logs, top.indices).logsumexp(-1, keepdim=True)], -1)


def _others(logs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The log-probabilities (n, vocabulary) with those at index (n, k) set to -inf."""
    return logs.scatter(1, index, -torch.inf)


def distillation(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    index: torch.Tensor,
    logs: torch.Tensor,
    chunk: int = CHUNK // 2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over tokens of KL(teacher || student) and of -log p(target), which has no gradient: float32
    scalars.

    Only the teacher's k likeliest tokens are known (`likeliest`: index (n, k), logs (n, k + 1)); all others
    count as one entry, the rest. With p the teacher's and q the student's probabilities:

        sum_j p_j log(p_j / q_j)
        d/d logit_j = q_j - p_j among the k,  q_j - p_rest q_j / q_rest among the others

    The result is at most the full divergence, and zero if the two agree. The rest is summed and not computed
    as one minus the others: for a confident model it is smaller than the rounding error of 1. Other shapes as
    in `cross_entropy`.
    """
    return _Distillation.apply(hidden, head, targets, index, logs, chunk)


class _Distillation(torch.autograd.Function):
    apply: ClassVar[Callable[..., tuple[torch.Tensor, torch.Tensor]]]

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        index: torch.Tensor,
        logs: torch.Tensor,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        divergence, entropy = torch.zeros(2, dtype=torch.float32, device=hidden.device).unbind()
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            student = (hidden[rows] @ head.t()).float().log_softmax(-1)
            entropy += F.nll_loss(student, targets[rows], reduction="sum")
            other_logs = _others(student, index[rows])
            other_total = other_logs.logsumexp(-1, keepdim=True)
            p = logs[rows].exp()
            divergence += (
                p * (logs[rows] - torch.cat([student.gather(1, index[rows]), other_total], -1))
            ).sum()
            if gradient is not None:
                slope = (
                    student.exp_()
                    .sub_(other_logs.sub_(other_total).exp_().mul_(p[:, -1:]))
                    .scatter_add_(1, index[rows], -p[:, :-1])
                )
                gradient[rows] = slope.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy)
        return divergence, entropy

    @staticmethod
    def backward(
        ctx: Any, g: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * g, None, None, None, None, None
