"""Writes what a server needs besides the model. Runs only if the evaluation's gate has passed."""

from __future__ import annotations

import json
import shutil
from typing import Any

from model.families import serve
from model.families.serve import Served, Serving, ServingError
from stages import job
from stages.job import Job, StageError
from stages.package import card
from stages.package.parameters import Parameters

PORT = 8000


def run(task: Job) -> None:
    """Writes the artifact `serving`. Raises StageError if the gate did not pass, or if this vLLM cannot serve
    the model.
    """
    report = json.loads((task.inputs["evaluate"] / "report.json").read_text())
    gate = report["gate"]
    # An empty gate asks for nothing, so its `passed` means nothing.
    if not gate["passed"] or not (gate["asks"] or gate["unchecked"]):
        raise StageError(
            "the evaluation's gate did not pass: " + "; ".join(gate["why"] or ["it asks nothing"]),
            "a model that behaves as the recipe's gate asks",
            "Read report.md (build.py path evaluate), mend the data or the training, or change the gate;"
            " gate: none builds an image unchecked.",
        )
    if gate["unchecked"]:
        job.warning(
            gate["says"], "The model card says so too; write a gate before this model goes into production"
        )
    params = task.parameters(Parameters)
    serves = params.serves
    serving = serve.of_folder(task.inputs["base"])
    checkpoint = served_checkpoint(task, serving, serves)
    try:
        vllm = serve.installed()
        flags = serving.serve(
            vllm,
            task.device,
            checkpoint,
            params.max_model_len,
            params.max_num_seqs,
            params.memory_share,
            serving.base_name if serves == "tuned" else serving.name,
            params.kv_cache,
        )
    except ServingError as error:
        raise StageError(
            str(error),
            "a combination that this vLLM serves right",
            "Change the recipe's vLLM image, the layout, or what is served (package: {serves: ...}).",
        ) from error
    described = {
        "served_name": serving.name,
        "serves": serves,
        "vllm": vllm,
        "device": task.device,
        "args": flags.args,
        "env": flags.env,
        "port": PORT,
        "chat_template_kwargs": serving.request,
    }
    (task.output / "serve.json").write_text(json.dumps(described, indent=1) + "\n")
    (task.output / "check.json").write_text(
        json.dumps(check_question(task, serves), indent=1, ensure_ascii=False) + "\n"
    )
    for name in ("prompt.txt", "tools.json"):
        shutil.copyfile(task.inputs["data"] / name, task.output / name)
    (task.output / "README.md").write_text(card.markdown(described, report, checkpoint, task.provenance))
    job.progress(1, 1, "serving")


def served_checkpoint(task: Job, serving: Serving, serves: str) -> Served:
    """The properties of the served checkpoint that decide the server's flags."""
    match serves:
        case "nvfp4":
            return serve.quantised(task.inputs["quantize"])
        case "tuned":
            return serving.adapted(task.inputs["train"] / "adapter")
        case _:
            return Served()


def check_question(task: Job, serves: str) -> dict[str, Any]:
    """A question that the served model and the base answer differently. It shows which of the two a running
    server serves.
    """
    exchange = json.loads((task.inputs["evaluate"] / "exchange.json").read_text())
    base, answer = (exchange["answers"].get(column) for column in ("base", serves))
    if answer == base:
        raise StageError(
            f"the {serves} model answers every question as the base does",
            "a question that it answers otherwise",
            "Ask what the training is about (sources of evaluate), or train more: as it is, nobody could tell"
            " that it was tuned.",
        )
    return {
        **{name: exchange[name] for name in ("messages", "tools", "max_tokens")},
        "base": base,
        "expected": answer,
    }
