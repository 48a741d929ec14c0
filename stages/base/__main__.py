"""The base checkpoint: `hub`, `folder` or `tiny` (stage.toml)."""

from model.weights.paths import TRUST, CheckpointError
from stages import job
from stages.base import folder, hub, make
from stages.base.parameters import Parameters
from stages.job import Job, StageError


def run(task: Job) -> None:
    """Writes the base checkpoint from the source that the recipe names."""
    params = task.parameters(Parameters)
    run_source = {"hub": hub.run, "folder": folder.run, "tiny": make.run}[params.source]
    try:
        run_source(task)
    except CheckpointError as error:
        raise StageError(error.found, error.expected, error.remedy) from error
    if params.trust:
        (task.output / TRUST).write_text('{"trust": true}\n')


if __name__ == "__main__":
    job.main(run)
