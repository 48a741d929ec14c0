"""Which files of this repository a stage runs: its folder, `stages/job.py`, and what their imports reach."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from forge.finding import Refused, error

# Packages of this repository that a stage may import.
_ROOTS = ("stages", "model")
# Those of the host side, which it may not.
_HOST = ("forge", "product")
# Beside the code and without effect on the output: a contract's values come into the key one by one, and a
# Dockerfile as a part of the image.
_BESIDE = ("stage.toml", "README.md", "Dockerfile")


def closure(repo: Path, stage: str, apart: tuple[str, ...] = ()) -> list[Path]:
    """Sorted paths, relative to `repo`: the stage's folder without the files `apart`, and what its imports
    reach. Imports inside functions count; so does a data file that a module names in a string and that lies
    beside it. Refused if a file is not Python or imports what it may not.
    """
    own = repo / "stages" / stage
    left_out = {*_BESIDE, *apart}
    files = {
        p for p in own.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.name not in left_out
    }
    todo = [p for p in files if p.suffix == ".py"] + _packages(repo, own / "__main__.py")
    seen: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        names, beside = _mentions(repo, path)
        files.update(beside)
        for name in names:
            if name.split(".")[0] in _HOST:
                raise Refused(
                    error(
                        str(path.relative_to(repo)),
                        f"an import of {name}",
                        "stages.job, model and libraries",
                        "A stage runs where the host's packages are not.",
                    )
                )
            reached = _modules(repo, name)
            for module in reached:
                if _is_of_another_stage(repo, own, module):
                    raise Refused(
                        error(
                            str(path.relative_to(repo)),
                            f"an import of {name}",
                            "no import of another stage",
                            "What two stages share belongs in stages/ or model/.",
                        )
                    )
            todo += reached
    return sorted(p.relative_to(repo) for p in files | seen)


def _is_of_another_stage(repo: Path, own: Path, module: Path) -> bool:
    """Whether a module lies in the folder of a stage that is not `own`."""
    if not module.is_relative_to(repo / "stages") or module.is_relative_to(own):
        return False
    folder = repo / "stages" / module.relative_to(repo / "stages").parts[0]
    return (folder / "stage.toml").is_file()


def _packages(repo: Path, path: Path) -> list[Path]:
    """The `__init__.py` files that run when `path` is imported."""
    folders = [f for f in path.parents if f.is_relative_to(repo) and f != repo]
    return [f / "__init__.py" for f in folders if (f / "__init__.py").is_file()]


def _modules(repo: Path, name: str) -> list[Path]:
    """The files that `import name` runs; `name` may end in an attribute that is no module."""
    parts = name.split(".")
    if parts[0] not in _ROOTS:
        return []
    for length in range(len(parts), 0, -1):
        base = repo.joinpath(*parts[:length])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return [path, *_packages(repo, path)]
    return []


def _mentions(repo: Path, path: Path) -> tuple[set[str], set[Path]]:
    """Names that a module imports, made absolute, and the data files beside it that it names."""
    shown = path.relative_to(repo)
    try:
        imports, words = _parsed(path.read_bytes())
    except SyntaxError as fault:
        found = f"a fault of syntax: {fault.msg}"
        raise Refused(error(f"{shown}:{fault.lineno}", found, "Python", "Mend that line.")) from fault
    package = shown.parent.parts
    names = set()
    for level, dotted in imports:
        start = package[: len(package) - level + 1] if level else ()
        names.add(".".join([*start, dotted]))
    beside = {path.parent / word for word in words}
    return names, {p for p in beside if p.is_file() and p.resolve().is_relative_to(repo.resolve())}


@functools.cache  # stages share most of what they import
def _parsed(source: bytes) -> tuple[frozenset[tuple[int, str]], frozenset[str]]:
    """(level, dotted name) of each import, and the strings that could name a data file."""
    imports: set[tuple[int, str]] = set()
    words: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imports.update((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imports.update(
                (node.level, ".".join(filter(None, (node.module, alias.name)))) for alias in node.names
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _file_like(node.value):
            words.add(node.value)
    return frozenset(imports), frozenset(words)


def _file_like(text: str) -> bool:
    return 2 < len(text) < 100 and text.isprintable() and Path(text).suffix not in ("", ".py")
