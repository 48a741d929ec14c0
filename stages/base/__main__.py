"""The base checkpoint: `hub`, `folder` or `tiny` (stage.toml)."""

from stages import job
from stages.base import folder, hub, make
from stages.base.parameters import Parameters
from stages.job import Job


def run(task: Job) -> None:
    """Writes the base checkpoint from the source that the recipe names."""
    {"hub": hub.run, "folder": folder.run, "tiny": make.run}[task.parameters(Parameters).source](task)


if __name__ == "__main__":
    job.main(run)
