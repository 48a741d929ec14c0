"""The loss on trained tokens alone, and logits of no others.

A vocabulary of 131,072 makes the logits of 16,384 tokens 8.6 GB in float32, and three quarters of them are of tokens that are
not trained. Here logits are formed for trained tokens only, a chunk at a time; each chunk's gradient is taken while its logits
are there, so that none are kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nemotron.chat import IGNORED

CHUNK = 1024  # tokens whose logits are held: 0.5 GB in float32 at the real vocabulary


def trained(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions whose next token is trained, and those tokens: int64, both (n,). `labels`: (tokens,), one sequence.

    A document's first label is ignored always (nothing stands before it), so no document predicts into the next.
    """
    targets = labels[1:]
    positions = (targets != IGNORED).nonzero()[:, 0]
    return positions, targets[positions]


def cross_entropy(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """The sum, not the mean, over tokens of -log p(target): float32 scalar. It is the caller who knows how many tokens a step has.

    `hidden` (n, hidden size), `head` (vocabulary, hidden size) frozen, `targets` int64 (n,). Log-softmax in float32.
    """
    return _CrossEntropy.apply(hidden, head, targets, chunk)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, chunk):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for at in range(0, len(targets), chunk):
            rows, wanted = hidden[at : at + chunk], targets[at : at + chunk]
            logits = (rows @ head.t()).float()
            total += F.cross_entropy(logits, wanted, reduction="sum")
            if gradient is not None:
                # softmax minus one-hot: the derivative of the sum by the logits
                logits = logits.softmax(-1)
                logits[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
                gradient[at : at + chunk] = logits.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, g):
        (gradient,) = ctx.saved_tensors
        return gradient * g, None, None, None


def distillation(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, index: torch.Tensor, logs: torch.Tensor, chunk: int = CHUNK) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over tokens of KL(teacher || student), and of -log p(target) beside it, which has no gradient: float32 scalars.

    Of the teacher the k largest probabilities are known, `logs` float32 (n, k) at `index` int64 (n, k); all other tokens count as one,
    with what is left. With p the teacher's and q the student's, both with that rest as one more entry:

        sum_j p_j log(p_j / q_j);   d/d logit_j = q_j - p_j among the k,  q_j (1 - p_rest / q_rest) among the others

    It is at most the full divergence, and zero where the two agree. Other shapes as in `cross_entropy`.
    """
    return _Distillation.apply(hidden, head, targets, index, logs, chunk)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, index, logs, chunk):
        divergence, entropy = torch.zeros(2, dtype=torch.float32, device=hidden.device).unbind()
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for at in range(0, len(targets), chunk):
            part = slice(at, at + chunk)
            q_logs = (hidden[part] @ head.t()).float().log_softmax(-1)
            entropy += F.nll_loss(q_logs, targets[part], reduction="sum")
            p, q = logs[part].exp(), q_logs.gather(1, index[part])
            p_rest, q_rest = (_rest(probabilities) for probabilities in (p, q.exp()))
            divergence += (p * (logs[part] - q)).sum() + (p_rest * (p_rest / q_rest).log()).sum()
            if gradient is not None:
                slope = q_logs.exp_()
                among = slope.gather(1, index[part]) - p
                slope *= (1 - p_rest / q_rest)[:, None]
                gradient[part] = slope.scatter_(1, index[part], among).to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy)
        return divergence, entropy

    @staticmethod
    def backward(ctx, g, _):
        (gradient,) = ctx.saved_tensors
        return gradient * g, None, None, None, None, None


def _rest(probabilities: torch.Tensor) -> torch.Tensor:
    """What (n, k) probabilities leave of one, (n,); never zero, since it stands in a quotient."""
    return (1 - probabilities.sum(-1)).clamp(min=torch.finfo(torch.float32).tiny)
