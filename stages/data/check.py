"""Checks of stage data before a base is downloaded: prompt, tools, and the kinds of the conversations' files.

Only the start of each file of conversations is read. Parquet is recognised but not opened, because the
standard library has no reader for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from stages import check
from stages.check import Finding, PlannedStage
from stages.conversations import files, sent
from stages.job import StageError


def check_sources(stage: PlannedStage) -> list[Finding]:
    """A finding for each source that stage data would refuse as a whole, with the stage's own words."""
    readers: list[tuple[str, Callable[[], object]]] = [
        *(("prompt", partial(sent.read_prompt, path)) for path in stage.sources.get("prompt", [])),
        *(("tools", partial(sent.read_tools, path)) for path in stage.sources.get("tools", [])),
        ("conversations", partial(files.list_files, stage.sources.get("conversations", []))),
    ]
    findings = []
    for source, read in readers:
        try:
            read()
        except StageError as error:
            findings.append(
                Finding(f"{stage.stage}.sources.{source}", error.found, error.expected, error.remedy)
            )
    return findings


if __name__ == "__main__":
    check.main(check_sources)
