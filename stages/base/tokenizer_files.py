"""Writes the base's tokenizer, template and config, without its weights.

    python -m stages.base.tokenizer_files job.json

This is no stage: it makes no artifact and is in no key. `build.py data` starts it with the parameters,
sources and secrets of stage base, before that has run. What it writes is the same as in the stage's artifact.
"""

from __future__ import annotations

import json

from model.weights.paths import CheckpointError
from stages import job
from stages.base import folder, hub, make
from stages.base.parameters import Parameters
from stages.job import Job, StageError

PATTERNS = ("*.json", "*.jinja", "*.model")  # all that transformers may read a tokenizer from


def run(task: Job) -> None:
    """Writes the files into the output, from the source that the recipe names. Raises StageError as the stage
    does, but for the weights.
    """
    write = {"hub": _from_hub, "folder": _from_folder, "tiny": _of_tiny}
    try:
        write[task.parameters(Parameters).source](task)
    except CheckpointError as error:
        raise StageError(error.found, error.expected, error.remedy) from error


def _from_hub(task: Job) -> None:
    hub.download(task, PATTERNS)
    folder.check_description(task.output)


def _from_folder(task: Job) -> None:
    source = folder.given(task)
    folder.check_description(source)
    folder.link_files(source, task.output, PATTERNS)


def _of_tiny(task: Job) -> None:
    params = task.parameters(Parameters)
    make.check_sizes(params)
    try:
        taught = make.read_sources(task)
    except make.NoneUsable:
        taught = []  # no row is rendered then: stage data rejects every one, and says why
    tokenizer = make.make_tokenizer(taught, params.vocabulary, task.output)
    (task.output / "config.json").write_text(json.dumps(make.describe(params, tokenizer), indent=2) + "\n")


if __name__ == "__main__":
    job.main(run)
