"""The ways of a recipe side by side: what each made of the same base and data, from the artifacts that they left."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from forge import plan
from forge.finding import Refused, error
from forge.plan import Context

LAST = "evaluate"
KEPT = 0.02  # share of the questions by which the NVFP4 model may be behind the merged one and still counts as kept


def ways(context: Context) -> dict[str, Context]:
    """Way -> the context to run it in. Refused if the recipe has none."""
    found = context.recipe.ways
    if not found:
        raise Refused(error("compare", f"no ways in recipe {context.recipe.name}", "ways: at its top, each a few changed parameters",
                            "recipes/tiny.yaml has some: ways: {qad: {train: {rounded_share: 0.3, rounded_loss: teacher}}}"))
    return {name: replace(context, recipe=way) for name, way in found.items()}


def collect(contexts: dict[str, Context]) -> list[dict[str, Any]]:
    """A row for each way that was built: `way`, shares of questions passed by column (`pass`), `fidelity` of the quantised model, `kept`."""
    rows = []
    for name, context in contexts.items():
        evaluated, quantised = (plan.artifact(context, stage).folder for stage in (LAST, "quantize"))
        passed = json.loads((evaluated / "report.json").read_text())["pass"]
        fidelity = json.loads((quantised / "audit.json").read_text()).get("fidelity")
        rows.append({"way": name, "pass": passed, "fidelity": fidelity, "kept": passed["nvfp4"] >= passed["merged"] - KEPT - 1e-9})
    return rows
