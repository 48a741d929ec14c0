"""The base checkpoint: `hub`, `folder` or `tiny` (stage.toml)."""

from stages import job
from stages.base import folder, hub, make


def run(task: job.Job) -> None:
    {"hub": hub.run, "folder": folder.run, "tiny": make.run}[task.params["source"]](task)


if __name__ == "__main__":
    job.main(run)
