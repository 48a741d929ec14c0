"""Writes what a server needs besides the model. Runs only if the evaluation's gate has passed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import stages.serving
from model.families import serve
from model.families.markup import TEMPLATE_TOKENS
from model.families.serve import Served, Serving, ServingError
from stages import job
from stages.job import Job, StageError
from stages.package import card
from stages.package.parameters import Parameters
from stages.serving import (
    checks,
    expected_calls,
    front,
    json_schema,
    patterns,
    request,
    supervisor,
    tool_calls,
)

PORT = 8000
PROMPT = "prompt.txt"
# What runs in the served container beside vLLM, and is started from the artifact without one.
SERVER = (
    stages.serving,
    checks,
    expected_calls,
    front,
    request,
    json_schema,
    patterns,
    supervisor,
    tool_calls,
)


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
            f"{params.served_name}-base" if serves == "tuned" else params.served_name,
            params.kv_cache,
            serve.trusted(task.inputs["base"]),
        )
    except ServingError as error:
        raise StageError(
            str(error),
            "a combination that this vLLM serves right",
            "Change the recipe's vLLM image, the layout, or what is served (package: {serves: ...}).",
        ) from error
    described = {
        "served_name": params.served_name,
        "service": params.service.lower(),
        "assistant": params.assistant,
        "serves": serves,
        "vllm": vllm,
        "device": task.device,
        "args": flags.args,
        "env": flags.env,
        "port": PORT,
        "chat_template_kwargs": serving.request,
        "front": {
            "refused": control_tokens(task.inputs["base"]),
            "choices": params.max_choices,
            "tokens": params.max_model_len,
            "running": params.max_num_seqs,
            "waiting": params.max_waiting,
            "default_prompt": PROMPT if params.default_prompt == "insert" else "",
        },
        "memory_gb": memory_gb(served_files(task, serves), task.device),
    }
    (task.output / "serve.json").write_text(json.dumps(described, indent=1) + "\n")
    (task.output / "check.json").write_text(
        json.dumps(check_question(task, serves), indent=1, ensure_ascii=False) + "\n"
    )
    server = task.output / "server" / "stages" / "serving"
    server.mkdir(parents=True, exist_ok=True)
    for module in SERVER:
        path = Path(str(module.__file__))
        shutil.copyfile(path, server / path.name)
    for name in (PROMPT, "tools.json"):
        shutil.copyfile(task.inputs["data"] / name, task.output / name)
    made = card.Made.of(task.inputs)
    (task.output / "README.md").write_text(
        card.markdown(described, report, checkpoint, task.provenance, made)
    )
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


def served_files(task: Job, serves: str) -> Path:
    """The folder whose weights are loaded."""
    return task.inputs[{"nvfp4": "quantize", "merged": "merge", "tuned": "base"}[serves]]


def memory_gb(checkpoint: Path, device: str) -> int:
    """The limit of the server's container, in GB: the weights, decoded where a CPU computes (NVFP4 is a
    quarter of BF16, and both are held), and 16 GB for vLLM, its KV cache and its compilers.
    """
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) / 1e9
    return 16 + math.ceil(weights * (6 if device == "cpu" else 2))


def control_tokens(base: Path) -> list[str]:
    """What no message may hold, as in training: the tokenizer's added tokens and those of the template."""
    added = json.loads((base / "tokenizer.json").read_text()).get("added_tokens", [])
    return sorted({token["content"] for token in added if token["content"].strip()} | set(TEMPLATE_TOKENS))


def check_question(task: Job, serves: str) -> dict[str, Any]:
    """A question that the served model passes and the base fails. It shows which of the two a running server
    serves. `left_out` says why there is none: a question goes into the image only if the recipe's questions
    mark it as public, since the others may be private conversations.
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
    if not exchange["public"] or "base" not in exchange["failed"] or serves in exchange["failed"]:
        why = (
            'no question with "public": true is answered rightly by this model and wrongly by the base'
            if exchange["public"]
            else 'no question of the evaluation is marked "public": true'
        )
        job.warning(
            f"build.py serve will not check the model's behaviour: {why}",
            'Mark a question that holds nothing private with "public": true (docs/formats.md, Questions)',
        )
        return {"left_out": why}
    return {
        **{name: exchange[name] for name in ("messages", "tools", "max_tokens", "expect")},
        "base": base,
        "expected": answer,
    }
