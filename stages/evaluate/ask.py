"""Asks the base, the tuned and the NVFP4 model the same questions, with production's prompt and tools.

    python -m stages.evaluate.ask job.json

This is no stage: it makes no artifact and is in no key. `build.py ask` starts it with the inputs and
parameters of stage evaluate. `given.json` in the scratch folder is the list of questions, each the text of
one user message.
"""

from __future__ import annotations

import json
from typing import Any

from model.families import serve
from stages import job
from stages.evaluate import evaluate, questions
from stages.evaluate.parameters import Parameters
from stages.job import Job, StageError


def run(task: Job) -> None:
    """Writes `ask.json`: column -> the answer to each question, `content` and `tool_calls`."""
    params = task.parameters(Parameters)
    data = task.inputs["data"]
    system = {"role": "system", "content": (data / "prompt.txt").read_text().strip()}
    tools = json.loads((data / "tools.json").read_text())
    asked = json.loads((task.scratch / "given.json").read_text())
    rows = [
        {"messages": [system, {"role": "user", "content": question}], "tools": tools} for question in asked
    ]
    for number, row in enumerate(rows, 1):
        for finding in questions.template_findings(f"question {number}", row):
            raise StageError(f"{finding.subject}: {finding.found}", finding.expected, "Write it another way.")
    serving = serve.of_folder(task.inputs["base"])
    plans = evaluate.plan_servers(task, serving)
    if any("tuned" in plan.columns for plan in plans):  # merged would give the same answers once more
        plans = [plan for plan in plans if "merged" not in plan.columns]
    _, flags = evaluate.server_flags(task, serving, plans)
    answers: dict[str, list[dict[str, Any]]] = {}
    for plan, serve_flags in zip(plans, flags, strict=True):
        answered = evaluate.ask_server(plan, serve_flags, rows, params, serving.request)
        for column, said in answered.answers.items():
            answers[column] = [evaluate.visible_answer(answer) for answer in said]
    (task.output / "ask.json").write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    job.main(run)
