"""What every stage shares: reading the job file, and printing events as JSON lines (docs/formats.md)."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True)
class Job:
    """One run of one stage. Folders under `inputs` and `sources` are read-only; `output` starts empty.

    `previous` is the newest artifact that the stage made under another key. Only a stage whose contract asks
    for it gets one.
    """

    stage: str
    params: dict[str, Any]
    inputs: dict[str, Path]
    output: Path
    scratch: Path
    seed: int
    sources: dict[str, list[Path]] = field(default_factory=dict)
    secrets: dict[str, Path] = field(default_factory=dict)
    device: str = "cpu"
    provenance: dict[str, dict[str, str]] = field(default_factory=dict)
    previous: Path | None = None

    def parameters(self, kind: type[T]) -> T:
        """`params` as the stage's dataclass (stages/<name>/parameters.py). Raises StageError unless they
        are exactly its fields.
        """
        return typed(kind, self.params)


class StageError(Exception):
    """A failure that the user can mend: what was found, what was expected, what to do."""

    def __init__(self, found: str, expected: str, remedy: str):
        self.found, self.expected, self.remedy = map(printable, (found, expected, remedy))
        super().__init__(f"{self.found}; expected {self.expected}. {self.remedy}")


def printable(text: str) -> str:
    """`text` with escapes in place of all that cannot be printed but line ends, because words of a stranger
    may hold a terminal's control sequences.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def typed(kind: type[T], params: dict[str, Any]) -> T:
    """`params` as an object of the dataclass `kind`. Raises StageError that names each field that is
    missing and each name that is no field.
    """
    names = [entry.name for entry in fields(kind)]
    missing = [name for name in names if name not in params]
    unknown = [name for name in params if name not in names]
    if missing or unknown:
        faults = [
            f"{fault} {', '.join(group)}" for fault, group in (("no", missing), ("unknown", unknown)) if group
        ]
        raise StageError(
            f"in the job's params: {'; '.join(faults)}",
            f"exactly the parameters of {kind.__module__}",
            "build.py fills in every default; a job written by hand has to hold each of them.",
        )
    return kind(**params)


def read(path: str | Path) -> Job:
    """The job in the job file `path`."""
    raw = json.loads(Path(path).read_text())
    return Job(
        stage=raw["stage"],
        params=raw["params"],
        inputs={name: Path(p) for name, p in raw["inputs"].items()},
        output=Path(raw["output"]),
        scratch=Path(raw["scratch"]),
        seed=raw["seed"],
        sources={name: [Path(p) for p in paths] for name, paths in raw.get("sources", {}).items()},
        secrets={name: Path(p) for name, p in raw.get("secrets", {}).items()},
        device=raw.get("device", "cpu"),
        provenance=raw.get("provenance", {}),
        previous=Path(raw["previous"]) if raw.get("previous") else None,
    )


_events = sys.stdout


def _emit(event: str, **values: Any) -> None:
    shown = {name: printable(value) if isinstance(value, str) else value for name, value in values.items()}
    _events.write(json.dumps({"event": event, **shown}) + "\n")
    _events.flush()


def progress(done: float, total: float | None, unit: str, note: str = "") -> None:
    """Prints how much of `total` is done, counted in `unit`; `total` is None where it is not known."""
    _emit("progress", done=done, total=total, unit=unit, note=note)


def metric(name: str, value: float, step: int | None = None, unit: str = "") -> None:
    """Prints a measured value; `step` is the training step that it belongs to. Values in `bytes` are shown as
    sizes.
    """
    _emit("metric", name=name, value=value, step=step, unit=unit)


def warning(message: str, remedy: str = "") -> None:
    """Prints what the user should know, and what to do about it. The stage goes on."""
    _emit("warning", message=message, remedy=remedy)


def main(run: Callable[[Job], None]) -> None:
    """Runs a stage for `python -m stages.<name> job.json`. Exits with 1 after an `error` event."""
    global _events
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m stages.{Path(sys.argv[0]).parent.name} job.json")
    # Libraries may print to stdout. So events get a copy of the real stdout, and stdout goes to stderr.
    _events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # A stage in a container is process 1, which SIGTERM ends only if it listens.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    try:
        run(read(sys.argv[1]))
    except StageError as error:
        _emit("error", found=error.found, expected=error.expected, remedy=error.remedy)
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        _emit(
            "error",
            found=f"{type(error).__name__}: {error}{_source_line(error)}",
            expected="the stage to finish",
            remedy="This is a fault of the stage: report it with its log, which has the traceback.",
        )
        sys.exit(1)


def _source_line(error: Exception) -> str:
    """The innermost line of this repository in the traceback, such as ` (stages/data/prepare.py:40)`; ""
    if there is none.
    """
    root = Path(__file__).resolve().parents[1]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve().is_relative_to(root)
    ]
    return f" ({Path(frames[-1].filename).resolve().relative_to(root)}:{frames[-1].lineno})" if frames else ""
