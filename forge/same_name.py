"""Other recipe files that have the name of this one.

Runs, and what `status`, `explain`, `runs` and `gc` say, go by the name. So of two recipes with one name each
would be told what the other did.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from forge import journal
from forge.finding import Finding, warning
from forge.plan import Context
from forge.reading import raw_name
from forge.report import near


def findings(context: Context) -> list[Finding]:
    """A warning, if a recipe of the repository or one that was run from this home has the same name."""
    recipe = context.recipe
    name = raw_name(recipe.file)
    others = dict.fromkeys(
        path.resolve()
        for path in _known(context)
        if path.is_file() and not path.samefile(recipe.file) and raw_name(path) == name
    )
    if not others:
        return []
    return [
        warning(
            recipe.file.name,
            f"another recipe file with the name {name}: {', '.join(map(near, others))}",
            "a name for each, since runs, status, explain and gc go by it",
            f"Change `name:` in one of them. This one is {near(recipe.file)}",
        )
    ]


def _known(context: Context) -> Iterator[Path]:
    yield from sorted((context.repo / "recipes").glob("*.yaml"))
    for folder in journal.runs(context.store.home, context.recipe.name):
        if isinstance(file := journal.plan_of(folder).get("recipe_file"), str):
            yield Path(file)
