"""A stranger's path: a fresh clone, in which CONTRIBUTING.md's stage and executor are added, and run."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import HOME, REPO

TEXT = (REPO / "CONTRIBUTING.md").read_text()


def block(after: str, kind: str, number: int = 0) -> str:
    """The code of the `number`-th block of `kind` behind the words `after`."""
    assert after in TEXT, f"CONTRIBUTING.md has no {after!r}"
    return re.findall(rf"```{kind}\n(.*?)```", TEXT.split(after, 1)[1], re.DOTALL)[number]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone with the stage `hello`, its type, its recipe and the executor `plain`, and a home whose
    environments are this one's.
    """
    clone = tmp_path_factory.mktemp("stranger") / "annie"
    subprocess.run(["git", "clone", "--quiet", str(REPO), str(clone)], check=True)
    (clone / ".annie").mkdir()
    (clone / ".annie" / "envs").symlink_to((HOME / "envs").resolve())
    (clone / ".venv").symlink_to(sys.prefix)
    written = {
        "stages/hello/stage.toml": block("**1. Its contract**", "toml"),
        "stages/hello/__init__.py": "",
        "stages/hello/__main__.py": block("**2. Its code**", "python"),
        "stages/hello/Dockerfile": block("**3. Its image**", "dockerfile"),
        "recipes/hello.yaml": block("**5. A recipe**", "yaml"),
        "data/names.txt": "Ada\nGrace\n",
        "tests/stages/test_hello.py": block("**7. A test**, `tests/stages/test_hello.py`", "python"),
        "forge/executor/plain.py": block("**1. The class**", "python"),
        "tests/forge/test_executor_plain.py": block("**4. A test**, `tests/forge", "python"),
    }
    for name, content in written.items():
        (clone / name).parent.mkdir(exist_ok=True)
        (clone / name).write_text(content)
    with (clone / "stages/artifacts.toml").open("a") as types:
        types.write(block("**4. Its artifact type**", "toml"))
    table = "EXECUTORS = {\n"
    edit(clone / "forge/executors.py", table, table + block("**2. Its name**", "python"))
    generator = [sys.executable, "-m", "forge.typed_parameters"]  # as `make parameters` runs it
    assert ran(clone, *generator) == "wrote stages/hello/parameters.py\n"
    return clone


def edit(path, old, new):
    text = path.read_text()
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new, 1))


def ran(clone, *words):
    """What a command prints in the clone. It has to end with 0."""
    environment = {name: value for name, value in os.environ.items() if name != "ANNIE_HOME"}
    done = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("executor", ["local", "plain"])
def test_the_stage_runs_on_either_executor_and_then_has_nothing_to_do(clone, executor):
    run = (sys.executable, "build.py", "run", "--recipe", "hello", "--executor", executor)
    assert "hello" in ran(clone, *run)
    path = ran(
        clone, sys.executable, "build.py", "path", "hello", "--recipe", "hello", "--executor", executor
    )
    with open(f"{path.strip()}/greeting.txt") as greeting:
        assert greeting.read() == "Good morning Ada\nGood morning Grace\n"
    assert "nothing to do" in ran(clone, *run)


@pytest.mark.parametrize("file", ["tests/stages/test_hello.py", "tests/forge/test_executor_plain.py"])
def test_the_tests_that_it_shows_pass(clone, file):
    assert "0 failed" in ran(clone, sys.executable, "tests/run.py", file)


def test_the_class_that_it_shows_is_held_to_the_protocol(clone):
    pytest.importorskip("mypy", reason="make lint installs it")
    lint = (sys.executable, "tests/lint.py", "--executors")
    assert "Success" in ran(clone, *lint)
    edit(clone / "forge/executor/plain.py", "def poll(", "def polled(")
    with pytest.raises(AssertionError, match="protocol member"):
        ran(clone, *lint)


def test_its_other_commands_are_there():
    makefile = (REPO / "Makefile").read_text()
    targets = re.findall(r"^make ([\w./]+)", TEXT, re.MULTILINE)
    assert targets and all(f"\n{target}:" in makefile or f" {target} " in makefile for target in targets)
