"""The recipes that were run in this home and by which executor, so that a command that names neither speaks
of what was just built.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from forge import modes, recipe
from forge.finding import Refused, error

FILE = "last-runs.json"


@dataclass(frozen=True)
class LastRun:
    """The last run of a recipe: its file, and the executor's name."""

    recipe: Path
    executor: str


@dataclass(frozen=True)
class Choice:
    """The recipe and the executor that a command speaks of; without an executor the recipe or the machine
    decides. `note` is a sentence about what the last run decided, if it decided anything.
    """

    recipe: Path
    executor: str | None
    note: str = ""


def choose(home: Path, repo: Path, named: str | None, executor: str | None, default: str) -> Choice:
    """The choice for a command that was given these: without a recipe that of the last run, without an
    executor the one that the recipe was last run with. `default` is the recipe before any run. Refused if
    the recipe is not there.
    """
    runs = read(home, repo)
    if named or not runs:
        file = recipe.find(named or default, repo)
    else:
        file = runs[0].recipe
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in (repo / "recipes").glob("*.yaml")))
            remedy = f"Name another: --recipe RECIPE. In recipes/ there are: {known}."
            raise Refused(
                error("recipe", f"no file {file}, the recipe of the last run", "a recipe to speak of", remedy)
            )
    last = next((run.executor for run in runs if run.recipe == file.absolute()), None)
    decided = [] if named or not runs else [f"recipe {recipe.named(file, repo)}"]
    if last and not executor:
        decided.append(f"executor {last}")
    return Choice(file, executor or last, f"as in the last run: {', '.join(decided)}" if decided else "")


def read(home: Path, repo: Path) -> list[LastRun]:
    """The last run of each recipe, newest first. Refused if the file is damaged."""
    path = home / FILE
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_bytes())
        return [LastRun(repo / str(row["recipe"]), str(row["executor"])) for row in rows]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Refused(
            error(str(path), "no list of last runs", "what forge wrote there", f"Remove it: rm {path}")
        ) from None


def write(home: Path, repo: Path, file: Path, executor: str) -> None:
    """Notes a run of the recipe `file`. A recipe of the repository counts from its root, so that the note
    outlives a move of the clone. Recipes that are gone are left out.
    """
    file = file.absolute()
    noted, newest = read(home, repo), LastRun(file, executor)
    if noted[:1] == [newest]:
        return
    others = [run for run in noted if run.recipe != file and run.recipe.is_file()]
    rows = [
        {
            "recipe": str(run.recipe.relative_to(repo) if run.recipe.is_relative_to(repo) else run.recipe),
            "executor": run.executor,
        }
        for run in (newest, *others)
    ]
    modes.write(home / FILE, json.dumps(rows, indent=1) + "\n")
