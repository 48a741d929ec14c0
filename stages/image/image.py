"""Writes what a server needs beside the checkpoint, once the evaluation's gate has passed."""

from __future__ import annotations

import json
import shutil

from nemotron.serving import SERVED_NAME, THINKING_OFF, ServingError, installed, quantised, serve
from stages import job
from stages.image import card
from stages.job import Job, StageError

PORT = 8000


def run(its: Job) -> None:
    report = json.loads((its.inputs["evaluate"] / "report.json").read_text())
    if not report["gate"]["passed"]:
        raise StageError(
            "the evaluation's gate did not pass: " + "; ".join(report["gate"]["why"]), "a model that behaves as the recipe's gate asks",
            "Read report.md (build.py path evaluate), mend the data or the training, or change the gate.")
    checkpoint = quantised(its.inputs["quantize"])
    try:
        vllm = installed()
        flags = serve(vllm, its.device, checkpoint, its.params["max_model_len"], its.params["max_num_seqs"], its.params["memory_share"])
    except ServingError as error:
        raise StageError(str(error), "a combination that this vLLM serves right", "Change the recipe's vLLM image or the layout.") from error
    described = {
        "served_name": SERVED_NAME, "vllm": vllm, "device": its.device, "args": flags.args, "env": flags.env, "port": PORT,
        "chat_template_kwargs": THINKING_OFF,
    }
    (its.output / "serve.json").write_text(json.dumps(described, indent=1) + "\n")
    for name in ("prompt.txt", "tools.json"):
        shutil.copyfile(its.inputs["data"] / name, its.output / name)
    (its.output / "README.md").write_text(card.markdown(described, report, checkpoint.layout, its.provenance))
    job.progress(1, 1, "serving")
