"""The sizes of a run's steps: what is reported, and what is refused or warned of before training."""

from __future__ import annotations

from statistics import median

from stages import job
from stages.job import StageError
from stages.train.pack import Order

# Tokens of a step on one GPU. A step of any size decodes all 4-bit weights. So on an H100 steps of about
# 2,200 tokens train 8,492 tokens a second, and steps of 16,384 train 17,046 (docs/performance.md). ENOUGH is
# one packed sequence of the default length; FEW is a quarter of that.
FEW, ENOUGH = 4096, 16384


def check_lengths(lengths: list[int], held_out: list[int], sequence_tokens: int, batch_tokens: int) -> None:
    """Raises StageError if a conversation is longer than a packed sequence, or if a trained one is longer
    than a step.

    `lengths` and `held_out` are tokens of every conversation. If `batch_tokens` is 0, steps have no limit.
    """
    limits = [("a packed sequence", "sequence_tokens", sequence_tokens, lengths + held_out)]
    if batch_tokens:
        limits.append(("a step", "batch_tokens", batch_tokens, lengths))
    for container, name, limit, tokens in limits:
        if too_long := [length for length in tokens if length > limit]:
            raise StageError(
                f"{len(too_long)} conversations are longer than {container}, the longest"
                f" {max(too_long):,} tokens",
                f"at most {limit:,} ({name})",
                f"Set {name} to {max(too_long)} or more, or max_tokens of stage data to {limit} or less",
            )


def step_sizes(order: Order, steps: int) -> dict[str, float | None]:
    """For training.json: medians over `steps` steps, and how often a row is trained on average (`epochs`)."""
    chosen = [order.step(number) for number in range(steps)]
    return {
        "step_conversations": median(map(len, chosen)) if chosen else None,
        "step_tokens": median(sum(order.lengths[row] for row in rows) for rows in chosen) if chosen else None,
        "epochs": round(sum(map(len, chosen)) / len(order.lengths), 2),
    }


def warn_of_sizes(order: Order, steps: int, world: int, device: str) -> None:
    """Warns if steps train a conversation more than once, and if they are too small to keep `world` GPUs
    busy.
    """
    all_tokens, medians = sum(order.lengths), step_sizes(order, steps)
    if order.batch_tokens > all_tokens:
        job.warning(
            f"batch_tokens is {order.batch_tokens:,}, and all {len(order.lengths)} conversations together "
            f"have {all_tokens:,} tokens: every step trains some of them more than once",
            f"Set batch_tokens to {all_tokens} or less",
        )
    tokens = medians["step_tokens"]  # None for a run of no steps
    if device != "cuda" or tokens is None or tokens >= FEW * world:
        return
    advised_tokens = max(min(ENOUGH * world, all_tokens), *order.lengths)
    factor = advised_tokens / tokens
    if factor < 2:  # the data set is small, so no step could be much larger
        return
    fewer = max(3, round(steps / factor))
    gpus = f", for {world} GPUs" if world > 1 else ""
    job.warning(
        f"a step has {medians['step_conversations']:.0f} conversations with {tokens:,.0f} tokens "
        f"(medians){gpus}: too few to keep a GPU busy",
        f"Set batch_tokens: {advised_tokens} instead of batch. A step then trains {factor:.1f} times as many "
        f"conversations, so about {fewer} steps train as many as these {steps}, in less time",
    )
