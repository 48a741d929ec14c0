"""Which parameters of stage train do not go together. The host asks before any stage runs (check.py), and the
stage asks again when it knows the number of steps. Imports only the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stages.job import StageError
from stages.train.parameters import Parameters

# Steps before the guard's verdict: B is zero at first, so A has no gradient in step 1; and the warm-up may
# begin at a learning rate of zero.
LOOKED_AT = 3


@dataclass(frozen=True)
class Refusal:
    """What is wrong with `parameter`."""

    parameter: str
    error: StageError


def refusals(params: Parameters, world: int, steps: int | None) -> Iterator[Refusal]:
    """Everything that is refused in a run of `world` processes and `steps` steps; `steps` is None if it
    follows from `epochs` and from data that are not there yet.
    """
    if params.sharded and world == 1:
        yield Refusal(
            "sharded",
            StageError(
                "sharded with one process",
                "several that hold the base between them",
                "Set ranks to the number of GPUs, or leave sharded out",
            ),
        )
    if params.decoded_gb and params.method == "lora":
        yield Refusal(
            "decoded_gb",
            StageError(
                "decoded_gb with method lora",
                "method qlora or nvfp4",
                "The method holds the weights in BF16 already: leave decoded_gb out",
            ),
        )
    yield from _of_rounding(params, steps)
    if steps:
        yield from _of_steps(params, steps)


def require(params: Parameters, world: int, steps: int | None) -> None:
    """Raises the first of `refusals`."""
    for refusal in refusals(params, world, steps):
        raise refusal.error


def first_rounded(params: Parameters, steps: int) -> int:
    """The first step, from 0, whose weights go through the export's rounding; `steps` if there is none."""
    return steps - round(params.qat_share * steps)


def _of_rounding(params: Parameters, steps: int | None) -> Iterator[Refusal]:
    if params.qat_share and params.method != "lora":
        yield Refusal(
            "qat_share",
            StageError(
                f"qat_share with method {params.method}",
                "method lora",
                "The export rounds BF16 weights: hold the base in BF16, or leave qat_share 0",
            ),
        )
    if params.qat_share and steps and first_rounded(params, steps) == steps:
        yield Refusal(
            "qat_share",
            StageError(
                f"qat_share {params.qat_share:g} of {steps} steps, which is no step",
                f"a share of at least one step, {1 / steps:.2g}",
                "Raise qat_share, or leave it 0",
            ),
        )
    if params.qat_loss == "teacher" and not params.qat_share:
        yield Refusal(
            "qat_loss",
            StageError(
                "qat_loss teacher with nothing to learn from it",
                "a qat_share above 0",
                "Set qat_share (0.3, say), or leave qat_loss at labels",
            ),
        )


def _of_steps(params: Parameters, steps: int) -> Iterator[Refusal]:
    name = "epochs" if params.epochs else "steps"
    follows = f", which follows from epochs {params.epochs:g}" if params.epochs else ""
    if steps < LOOKED_AT:
        yield Refusal(
            name,
            StageError(
                f"steps = {steps}{follows}",
                f"{LOOKED_AT} or more, after which every adapter tensor has to have moved",
                f"Raise {name}, or set steps to 0 for an adapter that is left as it begins",
            ),
        )
    elif params.warmup_steps > steps:
        yield Refusal(
            "warmup_steps",
            StageError(
                f"warmup_steps = {params.warmup_steps}, and {steps} steps{follows}",
                f"at most {steps}",
                f"Lower warmup_steps ({max(1, steps // 10)}, say), or raise {name}",
            ),
        )
