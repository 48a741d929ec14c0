"""Checks of stage base's sources before it is made: are there lessons for the tiny base, and not too many."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from stages import check
from stages.base import limits
from stages.check import Finding, PlannedStage
from stages.conversations import content, files, rows
from stages.conversations.files import File
from stages.conversations.rows import Row

ROWS = 3000  # that are read here: enough to tell that they are too many, and read in a moment
BYTES = 3_000_000


def check_sources(stage: PlannedStage) -> list[Finding]:
    """An error if the tiny base has nothing to learn; a warning of each limit that conversations exceed."""
    if stage.params["source"] != "tiny":
        return []
    subject = f"{stage.stage}.sources"
    if not stage.sources.get("conversations"):
        if stage.sources.get("lessons"):
            return []
        return [
            Finding(
                subject,
                "neither conversations nor lessons",
                "something that the small base is taught",
                "Name `sources: {conversations: [...]}` in stage base, as in stage data.",
            )
        ]
    listed = files.list_files(stage.sources["conversations"]).files
    read = [file for file in listed if file.kind.name != content.PARQUET]  # Parquet needs a library
    size = sum(file.path.stat().st_size for file in read)
    if size > BYTES:
        excesses = [
            f"{size / 1e6:.0f} MB of conversations: the small base is made for less than {BYTES / 1e6:.0f} MB"
        ]
    else:
        excesses = limits.excesses([*islice(_rows(read), ROWS)])
    return [
        Finding(
            f"{subject}.conversations", excess, "conversations for a small model", limits.REMEDY, "warning"
        )
        for excess in excesses
    ]


def _rows(listed: list[File]) -> Iterator[Row]:
    return (row for file in listed for row in rows.read(file) if isinstance(row, Row))


if __name__ == "__main__":
    check.main(check_sources)
