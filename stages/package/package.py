"""Writes what a server needs beside the model, once the evaluation's gate has passed."""

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


def run(its: Job) -> None:
    report = json.loads((its.inputs["evaluate"] / "report.json").read_text())
    gate = report["gate"]
    # a gate that asks nothing passes whatever it sees
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
    params = its.parameters(Parameters)
    serves = params.serves
    serving = serve.of_folder(its.inputs["base"])
    checkpoint = served(its, serving, serves)
    try:
        vllm = serve.installed()
        flags = serving.serve(
            vllm,
            its.device,
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
        "device": its.device,
        "args": flags.args,
        "env": flags.env,
        "port": PORT,
        "chat_template_kwargs": serving.request,
    }
    (its.output / "serve.json").write_text(json.dumps(described, indent=1) + "\n")
    (its.output / "check.json").write_text(
        json.dumps(check(its, serves), indent=1, ensure_ascii=False) + "\n"
    )
    for name in ("prompt.txt", "tools.json"):
        shutil.copyfile(its.inputs["data"] / name, its.output / name)
    (its.output / "README.md").write_text(card.markdown(described, report, checkpoint, its.provenance))
    job.progress(1, 1, "serving")


def served(its: Job, serving: Serving, serves: str) -> Served:
    """What decides the flags of what is served."""
    match serves:
        case "nvfp4":
            return serve.quantised(its.inputs["quantize"])
        case "tuned":
            return serving.adapted(its.inputs["train"] / "adapter")
        case _:
            return Served()


def check(its: Job, serves: str) -> dict[str, Any]:
    """A question of the evaluation that the served model answers otherwise than the base, so that a
    running server can be told from one.
    """
    exchange = json.loads((its.inputs["evaluate"] / "exchange.json").read_text())
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
