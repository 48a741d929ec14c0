"""Writes `stages/<name>/parameters.py`: the parameters of a stage as a frozen dataclass, made from its
contract.

    make parameters

The file is no part of the stage's key as long as it follows the contract (`follows`). Names and values of
parameters come into the key one by one, and `doc` lines stand in comments.
"""

from __future__ import annotations

import ast
import json
import sys
import textwrap
from pathlib import Path

from forge import artifact_types, contract
from forge.contract import Contract, Parameter
from forge.finding import Refused, error
from forge.parameter import SCALARS

NAME = "parameters.py"
MARK = "made by `make parameters` from stage.toml: change that file instead."
WIDTH = 110  # columns, as in pyproject.toml
_TYPES = {"list[str]": "list[str]", "list[int]": "list[int]", "map": "dict[str, Any]"}


def annotation(parameter: Parameter) -> str:
    """The Python type of the parameter's value, such as `int` or `Literal["lora", "qlora"]`."""
    if parameter.type == "str" and parameter.choices:
        return _literal(parameter.choices + parameter.also)
    name, scalar = _TYPES.get(parameter.type, parameter.type), SCALARS.get(parameter.type)
    others = tuple(value for value in parameter.also if scalar is None or not isinstance(value, scalar))
    return f"{name} | {_literal(others)}" if others else name


def _literal(values: tuple[str, ...]) -> str:
    return f"Literal[{', '.join(map(json.dumps, values))}]"


def source(stage: Contract) -> str:
    """The text of `parameters.py`, in the form that `ruff format` leaves as it is."""
    fields = []
    for name, parameter in stage.parameters.items():
        comment = textwrap.wrap(parameter.doc, WIDTH, initial_indent="    # ", subsequent_indent="    # ")
        fields.append("\n".join([*comment, f"    {name}: {annotation(parameter)}"]))
    body = "\n".join(fields) or "    pass"
    names = [name for name in ("Any", "Literal") if name in body]
    typing = f"from typing import {', '.join(names)}\n" if names else ""
    return f'''"""The parameters of stage {stage.name}, {MARK}"""

from __future__ import annotations

from dataclasses import dataclass
{typing}

@dataclass(frozen=True, kw_only=True)
class Parameters:
{body}
'''


def follows(stage: Contract, path: Path) -> bool:
    """Whether `path` is the stage's `parameters.py` and says what the contract says, comments aside."""
    if path != stage.folder / NAME:
        return False
    try:
        return ast.dump(ast.parse(path.read_bytes())) == ast.dump(ast.parse(source(stage)))
    except SyntaxError:
        return False


def write(stage: Contract) -> bool:
    """Writes the stage's `parameters.py`, and says whether that changed it. Refused if the file is there
    and was not generated.
    """
    path, text = stage.folder / NAME, source(stage)
    before = path.read_text() if path.exists() else None
    if before is not None and MARK not in before:
        raise Refused(
            error(
                f"stages/{stage.name}/{NAME}",
                "a module of your own",
                "none, or one that `make parameters` wrote",
                "Rename it: this name is for the dataclass that is made from stage.toml.",
            )
        )
    path.write_text(text)
    return text != before


def main() -> int:
    """Writes the file of every stage whose contract has parameters."""
    stages = Path(__file__).resolve().parents[1] / "stages"
    try:
        types = artifact_types.load(stages)
        for path in sorted(stages.glob("*/stage.toml")):
            stage = contract.load(path.parent, types)
            if stage.parameters and write(stage):
                print(f"wrote stages/{stage.name}/{NAME}")
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
