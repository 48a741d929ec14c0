"""What each room imports is what docs/architecture.md allows, and no module reaches itself."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SHARED = ("stages.job", "stages.check", "stages.dataset")
READING = "stages.conversations"
SERVED = "stages.serving"
# Room -> what it may import of this repository. A module belongs to the first room that its name begins with.
ROOMS = {
    "build": ("forge", "product"),
    "forge.venv": (),
    "forge": ("forge",),
    "product": ("forge", "product"),
    **dict.fromkeys(SHARED, SHARED),
    SERVED: (SERVED,),
    READING: (READING, *SHARED, "model"),
    **{f"stages.{stage}": (f"stages.{stage}", *SHARED, READING, "model") for stage in ("base", "data")},
    **{f"stages.{stage}": (f"stages.{stage}", *SHARED, "model") for stage in ("train", "merge", "quantize")},
    **{f"stages.{stage}": (f"stages.{stage}", *SHARED, SERVED, "model") for stage in ("evaluate", "package")},
    "model.labels": (),
    "model.weights": ("model.weights",),
    "model.layers": ("model.layers", "model.weights", "model.labels"),
    "model.families": ("model.families", "model.layers", "model.weights", "model.labels"),
    "model": ("model",),
    "images": (),
    "bench": ("bench", "stages", "model"),
}
OWN = ("build", "forge", "product", "stages", "model", "images", "bench", "tests")


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module outside the tests."""
    found = {}
    for folder in ("build.py", "forge", "product", "stages", "model", "images", "bench"):
        place = REPO / folder
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            parts = path.relative_to(REPO).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, everywhere: bool) -> set[str]:
    """Names of this repository's modules that a file imports: anywhere, or at its top level alone (which
    leaves out what stands under TYPE_CHECKING).
    """
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in OWN}


def resolved(name: str, known: dict[str, Path]) -> str:
    """The module of an imported name, which may end in something that a module defines."""
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_may(room):
    known = modules()
    members = [name for name in known if next((r for r in ROOMS if within(name, r)), None) == room]
    assert members
    for name in members:
        for imported in imports(known[name], everywhere=True):
            assert any(within(imported, allowed) for allowed in ROOMS[room]), f"{name} imports {imported}"


def test_every_module_has_a_room():
    for name in modules():
        assert any(within(name, room) for room in ROOMS) or name == "stages", name


def test_no_module_reaches_itself_by_what_it_imports_at_its_top():
    known = modules()
    graph = {name: {resolved(i, known) for i in imports(path, False)} for name, path in known.items()}

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name in done:
            return
        for following in graph.get(name, ()):
            # A package and a module in it: importing the module runs the package first, which is no circle.
            if following != name:
                walk(following, (*path, name))
        done.add(name)

    done: set[str] = set()
    for name in graph:
        walk(name, ())


def strings(path: Path) -> set[str]:
    """The constant strings of a file, docstrings apart."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    }


def test_forge_names_no_stage_no_type_and_no_file_of_an_artifact():
    types = tomllib.loads((REPO / "stages/artifacts.toml").read_text())
    files = {pattern for patterns in types.values() for pattern in patterns} - {"README.md"}
    stages = {path.parent.name for path in (REPO / "stages").glob("*/stage.toml")}
    # of contracts and of Dockerfiles these are words too: what runs a stage, and what an image starts from
    names = (stages | set(types) | files) - {"base"}
    for path in sorted((REPO / "forge").rglob("*.py")):
        assert strings(path) & names == set(), path
        assert not re.search("nemotron|nvfp4", path.read_text(), re.IGNORECASE), path


def test_the_table_of_rooms_is_that_of_the_documents():
    text = (REPO / "docs" / "architecture.md").read_text()
    for room in (
        "build.py",
        "forge/",
        "forge/venv.py",
        "product/",
        "stages/job.py",
        "stages/serving/",
        "model/labels.py",
        "model/weights/",
        "model/layers/",
        "model/families/",
        "model/",
        "bench/",
    ):
        assert f"`{room}`" in text, room
