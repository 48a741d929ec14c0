"""Following a task to its end: its events into the journal, its log, and what its failure means."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

from forge import preflight, trouble
from forge.executor import Executor, Task
from forge.finding import Finding, error
from forge.journal import Journal, Log

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What Python, OpenMP and the C library say where a process or a thread cannot be started.
_NO_PROCESS = re.compile(
    rf".*(?:can't start new thread|[Tt]hread creation failed|(?:BlockingIOError|fork).*"
    rf"{os.strerror(errno.EAGAIN)}).*"
)
TAIL = 12  # log lines that a failure shows
# The texts of the stage protocol's events (docs/formats.md).
_TEXTS = {
    "progress": ("unit", "note"),
    "metric": ("name", "unit"),
    "warning": ("message", "remedy"),
    "error": ("found", "expected", "remedy"),
}


class StageFailed(Exception):
    """A stage that ended without an artifact: the finding, and where its log lies (None: it has none)."""

    def __init__(self, finding: Finding, log: Path | None, tail: list[str]):
        super().__init__(str(finding))
        self.finding, self.log, self.tail = finding, log, tail

    @classmethod
    def of_findings(cls, findings: list[Finding], log: Log) -> StageFailed:
        """Several findings about the same thing as one failure."""
        first = findings[0]
        joined = error(
            first.subject,
            "; ".join(finding.found for finding in findings),
            "; ".join(dict.fromkeys(finding.expected for finding in findings)),
            first.remedy,
        )
        return cls(joined, log.path, log.tail(TAIL))

    def as_event(self) -> dict[str, Any]:
        """The values of the event `failed`, without the stage's name."""
        return {**self.finding.as_values(), "log": str(self.log or ""), "tail": self.tail}


def follow(executor: Executor, journal: Journal, home: Path, task: Task, log: Log) -> None:
    """Runs a task to its end. StageFailed if it exits with anything but 0, or reports an error."""
    last_error: dict[str, str] = {}
    running = executor.submit(task)
    try:
        for line in executor.logs(running):
            event = protocol_event(line.text) if line.stream == "stdout" else None
            if event is None:
                journal.emit("log", stage=task.stage, line=log.line(line.text))
                continue
            event = _on_host(event, executor.scratch, task.job["scratch"])
            if event["event"] == "error":
                last_error = event
            if event["event"] != "progress":
                log.line(_log_line(event))
            journal.emit(event.pop("event"), stage=task.stage, **event)
        code = executor.poll(running)
    except BaseException as ended:
        try:
            if isinstance(ended, KeyboardInterrupt):
                note = "stopping, and saving what it can; Ctrl-C again ends it at once"
                journal.emit("progress", stage=task.stage, done=0, total=None, unit="", note=note)
        finally:
            executor.cancel(running)
        raise
    if code == 0 and not last_error:
        return
    # A stage that says why it failed is shown with that alone; what led to it, tracebacks too, is in the
    # log.
    tail = [] if last_error else log.tail(TAIL)
    told = {name: journal.mask.text(str(value)) for name, value in last_error.items()}
    if executor.out_of_memory(running):
        raise StageFailed(_out_of_memory(task, told.get("found", "")), log.path, tail)
    raise StageFailed(_failure(home, task, code, told, log), log.path, tail)


def _out_of_memory(task: Task, said: str) -> Finding:
    """What it means that the kernel killed a process of the task; `said` is the error that the task reported
    then, if it did.
    """
    return error(
        task.stage,
        f"a process that the kernel killed, because it reached the stage's memory limit of"
        f" {task.memory_gb:g} GB" + (f"; the stage said: {said}" if said else ""),
        "a stage that stays within needs.memory_gb of the recipe, or else of its contract",
        f"Raise it in the recipe ({task.program.stage}: {{needs: {{memory_gb: {task.memory_gb * 2:g}}}}}),"
        " or give the stage less to do. Run again to go on where it stopped.",
    )


def _failure(home: Path, task: Task, code: int | None, told: dict[str, str], log: Log) -> Finding:
    """Why a task failed: no room to write, the error that it reported (`told`), or its exit status."""
    said = "\n".join([*log.tail(60), told.get("found", "")])
    code_of_room = next((code for code in _NO_ROOM if os.strerror(code) in said), None)
    if code_of_room or preflight.disk_gb(home) < 0.05:
        return trouble.of_fault(home, OSError(code_of_room or errno.ENOSPC, "", str(home)))
    if refused := _NO_PROCESS.search(told.get("found", "") if told else said):
        return error(
            task.stage,
            refused[0].strip(),
            "processes and threads within the limits, of which the stage's own is needs.pids of the recipe"
            f" ({task.pids})",
            f"Raise it in the recipe ({task.program.stage}: {{needs: {{pids: {task.pids * 2}}}}}), or the"
            " machine's (ulimit -u).",
        )
    if told:
        return error(task.stage, *(told.get(name, "") for name in ("found", "expected", "remedy")))
    if code in (-9, 137):
        return error(
            task.stage,
            "an end by signal 9 (killed)",
            "a stage that ends by itself",
            f"Most often this machine's memory ran out, of which the stage takes about {task.memory_gb:g} GB:"
            " stop what else runs here, and run again to go on where it stopped.",
        )
    return error(task.stage, f"exit status {code}", "0", "The last lines of its log say more.")


def protocol_event(text: str) -> dict[str, Any] | None:
    """A line of the stage protocol, or None if it is something else."""
    if not text.startswith("{"):
        return None
    try:
        event = json.loads(text)
    except ValueError:
        return None
    if not isinstance(event, dict) or event.get("event") not in _TEXTS:
        return None
    # A stage that leaves out a field has said less, and must not end forge.
    whole: dict[str, Any] = dict.fromkeys(_TEXTS[event["event"]], "") | event
    if whole["event"] == "metric":
        value = whole.get("value")
        if not isinstance(value, float) and not _is_count(value):
            return None
    if whole["event"] == "progress":
        done, total = whole.get("done"), whole.get("total")
        whole |= {"done": done if _is_count(done) else 0, "total": total if _is_count(total) else None}
    return whole | {name: str(whole[name]) for name in _TEXTS[whole["event"]]}


def _is_count(value: object) -> bool:
    """Whether it is a number that shares and paces can be computed from; NaN and infinity are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18


def _on_host(event: dict[str, Any], inside: str, scratch: str) -> dict[str, Any]:
    """A warning or an error whose texts name files in the scratch folder as the user can open them.

    `inside`: the folder's path where the stage runs, "" if it is the host's own.
    """
    if not inside or event["event"] not in ("warning", "error"):
        return event
    path = re.compile(rf"(?<![\w./-]){re.escape(inside)}/")
    return {
        key: path.sub(lambda _: f"{scratch}/", value) if isinstance(value, str) else value
        for key, value in event.items()
    }


def _log_line(event: dict[str, Any]) -> str:
    """An event as a line of the log."""
    if event["event"] == "metric":
        step = f" (step {event['step']})" if event.get("step") is not None else ""
        return f"{event['name']} = {event['value']} {event['unit']}".rstrip() + step
    if event["event"] == "warning":
        return f"warning: {event['message']} {event['remedy']}".rstrip()
    return f"error: found {event['found']}; expected {event['expected']}. {event['remedy']}"
