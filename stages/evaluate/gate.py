"""The gate: what a report's columns have to reach before an image is built (docs/formats.md, The gate)."""

from __future__ import annotations

from typing import Any

COLUMNS = ("base", "tuned", "merged", "nvfp4")
RULES = ("at_least", "above", "within", "of")
NONE = "none"  # the image is built without a check
UNSET = "no gate was set"
EPSILON = 1e-9  # tolerance for the rounding of shares


def faults(gate: Any) -> list[str]:
    """What is wrong with `gate` itself, one sentence per fault; empty if nothing is."""
    if gate == NONE:
        return []
    if not isinstance(gate, dict):
        return [f"the gate is {gate!r}, which is neither a map of columns nor {NONE}"]
    reasons = []
    for column, rules in gate.items():
        if column not in COLUMNS:
            reasons.append(f"the gate names {column}, which is no column")
            continue
        rules = rules if isinstance(rules, dict) else {"at_least": rules}
        reasons += [f"{column}.{name} is no rule" for name in rules if name not in RULES]
        if not rules:
            reasons.append(f"{column} has no rule")
        for name in ("at_least", "within"):
            if name in rules and not _is_share(rules[name], above_zero=name == "at_least"):
                reasons.append(
                    f"{column}.{name} is {rules[name]!r}, which is no share"
                    f" {'above 0' if name == 'at_least' else 'from 0'} to 1"
                )
        for name in ("above", "of"):
            if name in rules and (rules[name] not in COLUMNS or rules[name] == column):
                reasons.append(f"{column}.{name} is {rules[name]!r}, which is no other column")
        if ("within" in rules) != ("of" in rules):
            reasons.append(f"{column} has only one of `within` and `of`")
    return reasons


def _is_share(value: Any, above_zero: bool) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and (value > 0 if above_zero else value >= 0) and value <= 1


def judge(gate: Any, passed: dict[str, float], questions: int, control: bool = False) -> dict[str, Any]:
    """The gate's part of `report.json`: `passed`, `why` it did not pass, what it `asks`, whether it is
    `unchecked` (`gate: none`), and all of it as one sentence (`says`).

    `passed` is the share of passed questions by column. If `tuned` was not measured, `merged` stands in for
    it: it is the same model, with the adapter added to the weights. A control's gate never passes, because no
    image may be built from a control.
    """
    asks, why = [], []
    for column, rules in gate.items() if isinstance(gate, dict) else ():
        for ask, fault in _rule_results(
            column, rules if isinstance(rules, dict) else {"at_least": rules}, passed, questions
        ):
            asks.append(ask)
            why += [fault] if fault else []
    why = list(dict.fromkeys(why))  # every rule of an unmeasured column fails with the same words
    if control:
        why = ["this is a control, whose adapter changes nothing"]
    elif not gate:
        why = [UNSET]
    judged = {"passed": not why, "why": why, "asks": asks, "unchecked": gate == NONE}
    return judged | {"says": _sentence(judged)}


def _rule_results(
    column: str, rules: dict[str, Any], passed: dict[str, float], questions: int
) -> list[tuple[str, str]]:
    """For each rule of one column: what it asks, and how it is broken ("" if it is kept)."""

    def measured_column(name: str) -> tuple[str, str]:
        """The column that is measured for `name`, and how the report calls it."""
        if name == "tuned" and "tuned" not in passed and "merged" in passed:
            return "merged", "merged (for tuned, which was not asked)"
        return name, name

    name, label = measured_column(column)
    if name not in passed:
        return [(f"{column} to be asked", f"{column} was not measured")]
    share, results = passed[name], []
    if "at_least" in rules:
        lowest = rules["at_least"]
        broken = share < lowest - EPSILON
        results.append(
            (
                f"{label} at least {lowest:.0%}",
                (
                    f"{label} passed {share:.0%} of the questions; the gate asks for at least {lowest:.0%}"
                    if broken
                    else ""
                ),
            )
        )
    for rule in ("above", "of"):
        if rule not in rules:
            continue
        reference, reference_label = measured_column(rules[rule])
        if reference not in passed:
            results.append((f"{reference} to be asked", f"{reference} was not measured"))
        elif rule == "above":
            broken = share <= passed[reference] + EPSILON
            results.append(
                (
                    f"{label} above {reference_label}",
                    (
                        f"{label} passed {share:.0%} of the questions, {reference_label}"
                        f" {passed[reference]:.0%}; the gate asks for more than that"
                        if broken
                        else ""
                    ),
                )
            )
        else:
            allowed = max(rules["within"], 1 / questions)
            margin = f"within {_points(rules['within'])} of {reference_label}, or one question"
            broken = share < passed[reference] - allowed - EPSILON
            results.append(
                (
                    f"{label} {margin}",
                    (
                        f"{label} passed {share:.0%} of the questions, {reference_label}"
                        f" {passed[reference]:.0%}; the gate asks for {label} {margin}"
                        if broken
                        else ""
                    ),
                )
            )
    return results


def _points(share: float) -> str:
    return f"{100 * share:g} points"


def _sentence(gate: dict[str, Any]) -> str:
    """The sentence of the report and the model card about the gate."""
    if gate["why"] == [UNSET]:
        return "No gate was set: nothing was asked of these shares, and no image is built."
    if not gate["passed"]:
        return f"The gate did not pass: {'; '.join(gate['why'])}."
    if gate["unchecked"]:
        return "No gate was set (`gate: none`): nothing was asked of these shares."
    return f"The gate passed: {'; '.join(gate['asks'])}."
