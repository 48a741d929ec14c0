"""Asking the models of a recipe the same questions, side by side: stages/evaluate/ask.py, in its image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forge import plan
from forge.executor import Executor
from forge.journal import Event
from forge.plan import Context
from forge.report import counted
from product import EVALUATE, aside
from product.aside import Module

MODULE = "ask"


def ask(
    context: Context,
    executor: Executor,
    questions: list[str],
    listener: Callable[[Event], None],
    wait: bool = True,
) -> list[dict[str, Any]] | None:
    """For each question `question` and `answers`: column -> `content` and `tool_calls`. None if it failed,
    which `listener` was told.

    Refused, before a server starts, if a model is not built or this machine cannot load it.
    """
    recipe = context.recipe
    step = aside.step_of(context, EVALUATE, "a recipe that evaluates, whose servers and inputs are used")
    for supplier in step.inputs.values():
        plan.artifact(context, supplier)
    aside.refuse(aside.lacking(context, executor, MODULE, [step]))
    again = f"python build.py ask --recipe {recipe.option} QUESTION"
    why = f"{counted(len(questions), 'question')} to base, tuned and nvfp4"
    module = Module(step, MODULE, why, seconds=60 * step.needs.minutes, given=questions)
    if (ran := aside.run(context, executor, [module], again, listener, wait)) is None:
        return None
    answers, _ = ran
    return [
        {"question": question, "answers": {column: answers[column][number] for column in answers}}
        for number, question in enumerate(questions)
    ]
