"""What a stage's own check says of its sources and parameters, before any stage runs.

The check is the stage's code, so it runs as a process of its own: this interpreter without site-packages,
since nothing is prepared yet and only the standard library is the same everywhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from forge.finding import Finding, error
from forge.plan import Context, Plan
from forge.recipe import Recipe, Step

SECONDS = 60  # a check that takes longer has gone wrong


def findings(context: Context, plan: Plan) -> list[Finding]:
    """Of every stage of `plan` that would run and whose contract names a check; nothing is read for those
    that are built.
    """
    steps = [context.recipe.stages[stage.name] for stage in plan.pending]
    return [
        finding
        for step in steps
        if step.contract.check
        for finding in _check(context, step, step.contract.check)
    ]


def described(recipe: Recipe, step: Step) -> dict[str, Any]:
    """What the check gets on stdin (docs/formats.md, A check): the stage, and the stages that supply its
    inputs.
    """
    return {
        **_alone(recipe, step),
        "inputs": {name: _alone(recipe, recipe.stages[supplier]) for name, supplier in step.inputs.items()},
    }


def _alone(recipe: Recipe, step: Step) -> dict[str, Any]:
    return {
        "stage": step.name,
        "device": recipe.device(step.name),
        "params": step.params,
        "sources": {name: [str(p.absolute()) for p in paths] for name, paths in step.sources.items()},
    }


def _check(context: Context, step: Step, module: str) -> list[Finding]:
    environment = {
        "PYTHONPATH": str(context.repo),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUTF8": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-S", "-m", module],
            input=json.dumps(described(context.recipe, step)),
            env=environment,
            cwd=Path(context.repo),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        if done.returncode == 0:
            return [_finding(json.loads(line)) for line in done.stdout.splitlines()]
        last = done.stderr.strip().splitlines()[-1:]
        said = f"exit status {done.returncode}: {' '.join(last)}"
    except subprocess.TimeoutExpired:
        said = f"no end after {SECONDS} s"
    except (ValueError, TypeError) as fault:
        said = f"an answer that is no finding ({fault})"
    return [
        error(
            step.name,
            f"its check {module} ended with {said}",
            "findings, a JSON object a line",
            "It is a fault of that module: report it with this line.",
        )
    ]


def _finding(raw: dict[str, Any]) -> Finding:
    """A line of the check's answer. TypeError or ValueError if it is none."""
    finding = Finding(**raw)
    if finding.level not in ("error", "warning", "note"):
        raise ValueError(f"the level {finding.level!r}")
    return finding
