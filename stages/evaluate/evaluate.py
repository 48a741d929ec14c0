"""Asks every model of the line the held-out questions through vLLM's API, and scores the answers.

base and tuned share a server if vLLM can add the adapter at run time. merged and nvfp4 have a server each.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.families import serve
from model.families.messages import normalise, served_tools
from model.families.serve import Serve, Served, Serving, ServingError
from stages import dataset, job
from stages.evaluate import asked, columns, failed, gate, report, training_answers
from stages.evaluate.columns import Columns
from stages.evaluate.parameters import Parameters
from stages.evaluate.server import Server
from stages.job import Job, StageError
from stages.serving import checks


@dataclass(frozen=True)
class ServerPlan:
    """One server and the columns that it answers (column -> the model's name in the API)."""

    model: Path
    checkpoint: Served
    columns: dict[str, str]
    adapter: Path | None = None

    @property
    def label(self) -> str:
        return " and ".join(self.columns)


def run(task: Job) -> None:
    """Asks all columns and writes the artifact `report`. Raises StageError if the gate or the questions are
    not valid.
    """
    params = task.parameters(Parameters)
    if faults := gate.faults(params.gate):
        raise StageError(
            "; ".join(faults),
            f"a gate on the columns {', '.join(gate.COLUMNS)}",
            "Mend `gate` in the recipe; docs/formats.md, The gate, says what it holds.",
        )
    rows = asked.load(task, params.checks)
    training = training_answers.trained(asked.training_rows(task.inputs["data"]))
    for finding in training_answers.findings(training, params.checks):
        job.warning(f"{finding.subject}: {finding.found}", finding.remedy)
    serving = serve.of_folder(task.inputs["base"])
    plans = plan_servers(task, serving)
    vllm, flags = server_flags(task, serving, plans)
    all_columns = Columns()
    for plan, serve_flags in zip(plans, flags, strict=True):
        kept = columns.load(task.scratch, plan.columns, len(rows))
        answered = kept or ask_server(plan, serve_flags, rows, params, serving.request)
        if plan.adapter:
            check_adapter(answered.answers, params.control)
        if not kept:
            answered.save(task.scratch)
        all_columns.add(answered)
    if any(all_columns.streamed_otherwise.values()):
        job.warning(
            f"answers that differ when they are streamed: {all_columns.streamed_otherwise}",
            "A few may be near ties that rounding decides, since vLLM batches requests by arrival; see the"
            " log of vLLM's parser otherwise",
        )
    write_report(task, vllm, rows, all_columns)


def ask_server(
    plan: ServerPlan, flags: Serve, rows: list[dict[str, Any]], params: Parameters, request: dict[str, Any]
) -> Columns:
    """Starts one server and asks its columns."""
    answered = Columns()
    with Server(plan.model, flags, plan.label, plan.adapter, params.concurrency) as server:
        for column, name in plan.columns.items():
            began = time.monotonic()
            answers = ask_all(server, name, rows, params, request, column)
            answered.streamed_otherwise[column] = sum(a.pop("streamed_otherwise") for a in answers)
            answered.answers[column] = answers
            answered.seconds[column] = round(time.monotonic() - began, 1)
    return answered


def server_flags(task: Job, serving: Serving, plans: list[ServerPlan]) -> tuple[str, list[Serve]]:
    """The version of vLLM, and its flags for each server. Raises StageError, before the first server starts,
    if one cannot be served right.
    """
    params = task.parameters(Parameters)
    try:
        vllm = serve.installed()
        return vllm, [
            serving.serve(
                vllm,
                task.device,
                plan.checkpoint,
                params.max_model_len,
                params.concurrency,
                params.memory_share,
                kv_cache=params.kv_cache,
                trusted=serve.trusted(task.inputs["base"]),
            )
            for plan in plans
        ]
    except ServingError as error:
        raise StageError(
            str(error),
            "a combination that this vLLM serves right",
            "Change the recipe's vLLM image, layout or targets.",
        ) from error


def plan_servers(task: Job, serving: Serving) -> list[ServerPlan]:
    """The servers that answer the columns. Without `tuned`, with a warning, if vLLM cannot add the adapter at
    run time.
    """
    adapter = task.inputs["train"] / "adapter"
    tuned = serving.adapted(adapter)
    plans = []
    if tuned.lora_attention_only:
        plans.append(
            ServerPlan(task.inputs["base"], tuned, {"base": serving.name, "tuned": "tuned"}, adapter)
        )
    else:
        job.warning(
            "the adapter is not on attention alone, which vLLM cannot add at run time everywhere: the column"
            " `tuned` is left out",
            "`merged` is the same model, with the adapter added to the weights; the merge stage compared"
            " the two",
        )
        plans.append(ServerPlan(task.inputs["base"], Served(), {"base": serving.name}))
    plans.append(ServerPlan(task.inputs["merge"], Served(), {"merged": serving.name}))
    nvfp4 = task.inputs["quantize"]
    plans.append(ServerPlan(nvfp4, serve.quantised(nvfp4), {"nvfp4": serving.name}))
    return plans


def ask_all(
    server: Server,
    name: str,
    rows: list[dict[str, Any]],
    params: Parameters,
    request: dict[str, Any],
    label: str,
) -> list[dict[str, Any]]:
    """An answer for every question, in the order of `rows`. Several are asked at once. Messages and tools are
    sent in the form that is trained.

    A question with tools is asked a second time, streamed, because vLLM parses the two apart;
    `streamed_otherwise` of the answer says whether that gave something else.
    """
    done = 0

    def ask(question: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        body = {
            "model": name,
            "messages": [as_openai(m) for m in normalise(question["messages"])],
            "max_tokens": params.max_tokens,
            "temperature": 0,
            "seed": 0,
            "chat_template_kwargs": request,
        }
        if question.get("tools"):
            body["tools"] = served_tools(question["tools"])
        answer = first_answer(server.ask(body))
        otherwise = "tools" in body and (
            visible_answer(answer) != visible_answer(first_answer(server.ask_streamed(body)))
        )
        done += 1
        job.progress(done, len(rows), "question", label)
        return {**answer, "streamed_otherwise": otherwise}

    with ThreadPoolExecutor(params.concurrency) as pool:
        return list(pool.map(ask, rows))


def first_answer(completion: dict[str, Any]) -> dict[str, Any]:
    """The message of a chat completion, and why it ended."""
    choice = completion["choices"][0]
    return {**choice["message"], "finish_reason": choice["finish_reason"]}


def as_openai(message: dict[str, Any]) -> dict[str, Any]:
    """A message as a client sends it: arguments as JSON text, and without the keys that only training uses.

    The reasoning is left out too. A server with thinking off returns none, so a client has none to send back.
    """
    message = {key: value for key, value in message.items() if key not in ("train", "reasoning_content")}
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        calls.append(
            {"id": "call_1", "type": "function", **call, "function": {**call["function"], "arguments": text}}
        )
    return {**message, "tool_calls": calls}


def check_adapter(answers: dict[str, list[dict[str, Any]]], control: bool = False) -> None:
    """Raises StageError if the adapter changes no answer: a server may accept an adapter and not apply it.

    A control should change no answer. If it does, there is only a warning: vLLM batches requests by arrival,
    and the composition of a batch changes floating-point rounding.
    """
    changed = sum(
        visible_answer(a) != visible_answer(b) for a, b in zip(answers["base"], answers["tuned"], strict=True)
    )
    if control and changed:
        job.warning(
            f"the control changes {changed} of {len(answers['base'])} answers",
            "A few may be near ties that rounding decides; many mean that vLLM adds something that is not"
            " zero",
        )
    elif not control and not changed:
        raise StageError(
            "the adapter changes no answer",
            "other answers than the base's",
            "vLLM did not apply it (names that match nothing), or it was not trained.",
        )


def exchange(
    rows: list[dict[str, Any]],
    failures: dict[str, list[list[Any]]],
    answers: dict[str, list[dict[str, Any]]],
    max_tokens: int,
) -> dict[str, Any]:
    """The question that shows the adapter's effect best: one that may be published, that NVFP4 passes and the
    base fails, and that most columns answer differently than the base.

    `failed` has the columns whose answer fails it.
    """

    def shown_effect(number: int) -> tuple[bool, bool, bool, int]:
        visible = {
            column: visible_answer(column_answers[number]) for column, column_answers in answers.items()
        }
        return (
            not failures["nvfp4"][number],
            bool(rows[number].get("public")),
            bool(failures["base"][number]),
            sum(answer != visible["base"] for answer in visible.values()),
        )

    best = max(range(len(rows)), key=shown_effect)  # the first one, if several are best
    return {
        "messages": [as_openai(m) for m in rows[best]["messages"]],
        "tools": rows[best].get("tools") or [],
        "max_tokens": max_tokens,
        "expect": rows[best].get("expect", {}),
        "public": bool(rows[best].get("public")),
        "failed": [column for column in answers if failures[column][best]],
        "answers": {
            column: visible_answer(column_answers[best]) for column, column_answers in answers.items()
        },
    }


def visible_answer(answer: dict[str, Any]) -> dict[str, Any]:
    """What a user sees of an answer: its text and its calls."""
    calls = [
        {"function": {key: call["function"][key] for key in ("name", "arguments")}}
        for call in answer.get("tool_calls") or []
    ]
    return {"content": answer.get("content"), "tool_calls": calls}


def write_report(
    task: Job,
    vllm: str,
    rows: list[dict[str, Any]],
    answered: Columns,
) -> None:
    """Scores the answers and writes the artifact's files."""
    answers = answered.answers
    failures = {
        column: [checks.failures(q, a) for q, a in zip(rows, column_answers, strict=False)]
        for column, column_answers in answers.items()
    }
    params = task.parameters(Parameters)
    summary = report.summarise(rows, failures, params.gate, params.control) | {
        "seconds": answered.seconds,
        "streamed_otherwise": answered.streamed_otherwise,
        "vllm": vllm,
    }
    (task.output / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    (task.output / "report.md").write_text(
        report.markdown(summary) + failed.markdown(rows, answers, failures)
    )
    report.draw_picture(task.output / "behaviour.png", summary)
    dataset.write(
        task.output / "answers.jsonl",
        (
            {
                "id": question["id"],
                "column": column,
                "question": question["messages"][-1].get("content"),
                "answer": column_answers[number].get("content"),
                "tool_calls": column_answers[number].get("tool_calls") or [],
                "failures": [asdict(f) for f in failures[column][number]],
                "off": checks.off(question),
            }
            for number, question in enumerate(rows)
            for column, column_answers in answers.items()
        ),
    )
    (task.output / "exchange.json").write_text(
        json.dumps(exchange(rows, failures, answers, params.max_tokens), indent=2, ensure_ascii=False) + "\n"
    )
    for column, share in summary["pass"].items():
        job.metric(f"pass_{column}", share)
    if not summary["gate"]["passed"] and not params.control:
        job.warning(summary["gate"]["says"], "no serving image is made from this; see report.md")
