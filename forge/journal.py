"""The folder of one run: `plan.json`, `events.jsonl`, and per stage `<nn>-<stage>.{sh,log,json}`."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge import modes
from forge.contract import nearest
from forge.finding import Refused, error
from forge.mask import Mask

if TYPE_CHECKING:
    from forge.recipe import Recipe

Event = dict[str, Any]
ENDINGS = ("done", "failed", "interrupted")
# Events that status, gc and a person look for later: a power cut is not to take them.
_LASTING = (*ENDINGS, "stage", "stage_done")


class Journal:
    """Writes every event of a run to its folder, masked, and passes it on to `listener`."""

    def __init__(self, home: Path, recipe: str, mask: Mask, listener: Callable[[Event], None]):
        self.folder = _new_folder(home / "runs", recipe, _now())
        self.mask = mask
        self._listener = listener
        self._events = modes.open_file(self.folder / "events.jsonl", "a", buffering=1)
        fcntl.flock(self._events, fcntl.LOCK_EX)  # the kernel frees it, however this run ends: see `alive`
        self._log: Log | None = None
        self._unattended = False

    def plan(self, plan: dict[str, Any]) -> None:
        modes.write(self.folder / "plan.json", json.dumps({"pid": os.getpid(), **plan}, indent=1) + "\n")

    def recipe(self, text: str) -> None:
        """Keeps the recipe as it was, masked; who goes back to this run needs it."""
        modes.write(self.folder / "recipe.yaml", self.mask.text(text))

    def emit(self, event: str, **values: Any) -> None:
        masked = self._masked(event, values)
        self._listener(masked)  # first: how a run failed is told even where it cannot be written
        self._write(masked)

    def _masked(self, event: str, values: Event) -> Event:
        whole = {"event": event, "time": _now().isoformat(timespec="milliseconds"), **values}
        masked: Event = json.loads(self.mask.text(json.dumps(whole, default=str)))
        return masked

    def _write(self, masked: Event) -> None:
        if masked["event"] != "log":  # log lines have a file of their own
            self._events.write(json.dumps(masked) + "\n")
        if masked["event"] in _LASTING:
            os.fsync(self._events.fileno())

    def unattended(self) -> None:
        """Writes, once, that the terminal of the run has closed: as an event, and into the log that is open.
        The listener, whose output that was, is not told.
        """
        if self._unattended:
            return
        self._unattended = True
        self._write(self._masked("unattended", {}))
        if self._log and not self._log.closed:
            self._log.line("The terminal that started this run has closed. The run goes on.")

    def log(self, prefix: str) -> Log:
        self._log = Log(self.folder / f"{prefix}.log", self.mask)
        return self._log

    def close(self) -> None:
        self._events.close()


class Log:
    """A stage's log: lines as they come, masked; a carriage return (progress bars) overwrites, as on a
    screen.
    """

    def __init__(self, path: Path, mask: Mask):
        self.path = path
        self._mask = mask
        self._file = modes.open_file(path, "a", buffering=1, errors="replace")

    def line(self, text: str) -> str:
        """Writes one line and returns it as it was written."""
        shown = self._mask.text(text.rstrip("\r\n").rsplit("\r", 1)[-1])
        self._file.write(shown + "\n")
        return shown

    def tail(self, count: int) -> list[str]:
        return self.path.read_text(errors="replace").splitlines()[-count:]

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        modes.sync(self.path.parent)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


# A second in UTC, and a number where the clock was not past the newest folder: names sort as runs began.
_NAME = re.compile(r"(\d{8}-\d{6})(?:\.(\d{4}))?-(.+)")


def _new_folder(runs: Path, recipe: str, now: datetime.datetime) -> Path:
    """Creates the folder of a new run. Its name comes after all that are there, also if the clock went
    back. For the holder of the lock.
    """
    modes.make_folder(runs)
    newest = max((name[1], int(name[2] or 0)) for name in _names(runs)) if _names(runs) else ("", 0)
    stamp = f"{now:%Y%m%d-%H%M%S}"
    if stamp <= newest[0]:
        stamp = f"{newest[0]}.{newest[1] + 1:04d}"
    return modes.make_folder(runs / f"{stamp}-{recipe}")


def _names(runs: Path) -> list[re.Match[str]]:
    """The names of the run folders, taken apart."""
    return [name for path in runs.glob("*") if (name := _NAME.fullmatch(path.name))]


def runs(home: Path, recipe: str) -> list[Path]:
    """The run folders of a recipe, newest first."""
    named = (name[0] for name in _names(home / "runs") if name[3] == recipe)
    return [home / "runs" / name for name in sorted(named, reverse=True)]


def began(folder: Path) -> datetime.datetime:
    """When a run began, by the name of its folder."""
    name = _NAME.fullmatch(folder.name)
    assert name, folder
    return datetime.datetime.strptime(name[1] + "+0000", "%Y%m%d-%H%M%S%z")


def stamp(folder: Path) -> str:
    """What tells the runs of a recipe apart: the name of a run's folder without the recipe's."""
    name = _NAME.fullmatch(folder.name)
    assert name, folder
    return folder.name.removesuffix(f"-{name[3]}")


def recipes(home: Path) -> list[str]:
    """The recipes that have runs."""
    return sorted({name[3] for name in _names(home / "runs")})


def places(folder: Path) -> set[tuple[str, str]]:
    """Stage and key of everything that a run made, used or meant to make, as far as its folder says."""
    return places_in(plan_of(folder), events(folder))


def places_in(plan: dict[str, Any], events: list[Event]) -> set[tuple[str, str]]:
    """The same by the run's plan and events."""
    stages = plan.get("stages")
    told = [*(stages if isinstance(stages, list) else []), *events]
    pairs = [(entry.get("stage"), entry.get("key")) for entry in told if isinstance(entry, dict)]
    return {(stage, key) for stage, key in pairs if isinstance(stage, str) and isinstance(key, str)}


def last_log(home: Path, recipe: str, stage: str, executor: str | None = None, run: str = "") -> Path | None:
    """The newest log of a stage under a recipe, by one executor or by any, of the runs whose name begins
    with `run`.
    """
    # An image may have a stage's name; the logs of images are numbered 00.
    logs = (
        path
        for folder in runs(home, recipe)
        if folder.name.startswith(run)
        for path in folder.glob(f"[0-9][0-9]-{stage}.log")
        if not path.name.startswith("00-")
    )
    return next((path for path in logs if executor in (None, plan_of(path.parent).get("executor"))), None)


def plan_of(folder: Path) -> dict[str, Any]:
    """The plan of a run; an empty one where a crash or a full disk left none."""
    try:
        plan = json.loads((folder / "plan.json").read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return plan if isinstance(plan, dict) else {}


def under_way(home: Path) -> Path | None:
    """The folder of the run under way, of any recipe."""
    newest = max((name[0] for name in _names(home / "runs")), default=None)
    return home / "runs" / newest if newest and alive(home / "runs" / newest) else None


def events(folder: Path) -> list[Event]:
    """What has happened so far in a run; lines that are torn or still being written are left out."""
    path = folder / "events.jsonl"
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [event for line in lines if (event := _event(line)) is not None]


def _event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def read_log(
    home: Path,
    recipe: Recipe,
    stage: str,
    follow: bool,
    executor: str | None = None,
    run: str = "",
) -> Iterator[str]:
    """The newest log of a stage in pieces, or that of the run `run`; with `follow`, until the stage or its
    run ends.
    """
    path = last_log(home, recipe.name, stage, executor, run)
    if path is None:
        if stage not in recipe.stages:
            remedy = nearest(stage, recipe.stages)
        elif run:
            remedy = f"See python build.py runs {recipe.option}"
        else:
            remedy = f"python build.py run --recipe {recipe.option} --until {stage}"
        where = f"in run {run} of recipe {recipe.name}" if run else f"under recipe {recipe.name}"
        raise Refused(error(stage, f"no log {where}", "a stage that has run", remedy))
    with open(path, errors="replace") as stream:
        while True:
            # asked before the rest is read, so that nothing is lost
            over = not follow or _over(path.parent, stage)
            yield from iter(lambda: stream.read(1 << 16), "")
            if over:
                return
            time.sleep(0.3)


def _over(folder: Path, stage: str) -> bool:
    """Whether a stage of a run has ended, or its run's process is gone."""
    for event in events(folder):
        if event["event"] in ENDINGS or (event["event"] == "stage_done" and event.get("stage") == stage):
            return True
    return not alive(folder)


def alive(folder: Path) -> bool:
    """Whether a run goes on: its process holds the lock of its events. A process of the same number, as there
    may be one after a power cut, does not.
    """
    try:
        with open(folder / "events.jsonl", "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
