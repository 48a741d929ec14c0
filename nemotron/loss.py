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
