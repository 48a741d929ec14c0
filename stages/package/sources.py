"""Checks of stage package before anything is built: it needs a gate that can pass."""

from __future__ import annotations

from stages import check
from stages.check import Finding, PlannedStage


def check_sources(stage: PlannedStage) -> list[Finding]:
    """A finding if no image can result: without a gate, or for a control, whose gate never passes."""
    params = stage.inputs["evaluate"].params
    if params["control"]:
        return [
            Finding(
                "evaluate.control",
                "a control, of which no image is made",
                "control: false in a recipe with stage package",
                "Run it with --until evaluate, or leave stage package out of the recipe.",
            )
        ]
    if not params["gate"]:
        return [
            Finding(
                "evaluate.gate",
                "no gate, and stage package, which builds nothing without one",
                "gate: what the columns have to reach",
                "Write one, such as gate: {tuned: {at_least: 0.8, above: base}, nvfp4: {within: 0.02, of:"
                " tuned}}, or gate: none to build the image unchecked.",
            )
        ]
    return []


if __name__ == "__main__":
    check.main(check_sources)
