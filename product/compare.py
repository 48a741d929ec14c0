"""The variants of a recipe side by side: what each made of the same base and data, from the artifacts that
they left.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from forge import plan
from forge.finding import Refused, error
from forge.plan import Context
from product import EVALUATE, QUANTIZE

# of the questions in a hundred, by which the NVFP4 model may be behind the tuned one and still counts as kept
POINTS = 2


def variants(context: Context) -> dict[str, Context]:
    """Variant -> the context to run it in. Refused if the recipe has none."""
    recipes = context.recipe.variants
    if not recipes:
        raise Refused(
            error(
                "compare",
                f"no variants in recipe {context.recipe.name}",
                "variants: at its top, each a few changed parameters",
                "recipes/tiny.yaml has some: variants: {qad: {train: {qat_share: 0.3, qat_loss: teacher}}}",
            )
        )
    return {name: replace(context, recipe=variant) for name, variant in recipes.items()}


def rows(contexts: dict[str, Context]) -> list[dict[str, Any]]:
    """A row for each variant that was built (docs/formats.md, What compare prints)."""
    collected = []
    for name, context in contexts.items():
        evaluated, quantised = (plan.artifact(context, stage).folder for stage in (EVALUATE, QUANTIZE))
        report = json.loads((evaluated / "report.json").read_text())
        fidelity = json.loads((quantised / "audit.json").read_text()).get("fidelity")
        collected.append(
            {
                "variant": name,
                "pass": report["pass"],
                "fidelity": fidelity,
                **judgement(report["pass"], report["control"]),
            }
        )
    return collected


def judgement(passed: dict[str, float], control: bool) -> dict[str, str]:
    """What the NVFP4 column is held `against` (tuned, or merged where tuned was not asked) and the
    `verdict`: kept, lost, or control.
    """
    against = "tuned" if "tuned" in passed else "merged"
    kept = passed["nvfp4"] >= passed[against] - POINTS / 100 - 1e-9  # shares are sums of binary fractions
    # a control was taught nothing that could be kept
    return {"against": against, "verdict": "control" if control else "kept" if kept else "lost"}


def verdict(rows: list[dict[str, Any]]) -> str:
    """Which variants keep what was tuned, in one sentence."""
    kept, lost = ([row["variant"] for row in rows if row["verdict"] == word] for word in ("kept", "lost"))
    return f"NVFP4 within {POINTS} points of tuned: {', '.join(kept) or 'no variant'}" + (
        f"; not: {', '.join(lost)}" if lost else ""
    )
