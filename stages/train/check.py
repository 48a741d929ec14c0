"""Checks of stage train before a base is downloaded: parameters that do not go together, here and with those
of stage data. What depends on the model or on the number of conversations, the stage itself checks.
"""

from __future__ import annotations

from collections.abc import Iterator

from stages import check
from stages.check import Finding, PlannedStage
from stages.train.limits import refusals
from stages.train.parameters import Parameters


def check_parameters(stage: PlannedStage) -> Iterator[Finding]:
    """A finding for each refusal, and a warning if stage data lets longer conversations pass than fit."""
    params = stage.parameters(Parameters)
    for refusal in refusals(params, params.ranks, None if params.epochs else params.steps):
        error = refusal.error
        yield Finding(f"{stage.stage}.{refusal.parameter}", error.found, error.expected, error.remedy)
    longest = stage.inputs["data"].params.get("max_tokens", 0) if "data" in stage.inputs else 0
    limits = {"sequence_tokens": params.sequence_tokens, "batch_tokens": params.batch_tokens}
    for name, limit in limits.items():
        if 0 < limit < longest:
            yield Finding(
                f"{stage.stage}.{name}",
                f"{name} {limit:,}, and stage data keeps conversations of up to {longest:,} tokens"
                " (max_tokens)",
                f"{name} of at least max_tokens, or no conversation that is longer than {limit:,}",
                f"A longer one would stop this stage before it trains. Raise {name}, or lower max_tokens",
                "warning",
            )


if __name__ == "__main__":
    check.main(check_parameters)
