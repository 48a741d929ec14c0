"""A parameter of a stage: its type, its range, and for a map the shape of what stands in it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

SCALARS: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}
TYPES = (*SCALARS, "list[str]", "list[int]", "map")
MISSING: Any = object()
RECIPE = "{recipe}"


def nearest(word: str, choices: Iterable[str]) -> str:
    """A sentence that names the valid word closest to `word`, or all of them."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]}?"
    return f"Valid here: {', '.join(choices)}." if choices else "Nothing is valid here."


def renamed(new: str) -> str:
    """A sentence for who still says the old name of something."""
    return f"It is called {new} now."


def convert(value: Any, kind: str) -> Any:
    """`value` as a parameter of type `kind`; TypeError if it is of another type.

    An int stands for a float. YAML 1.1 reads `1e-3` (no dot) as a string, so a string that is a number
    does too.
    """
    if kind == "float" and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise TypeError(kind) from None
        if not math.isfinite(number):
            raise TypeError(kind)
        return number
    if kind in SCALARS:
        # bool is a subclass of int: `rank: true` must not become 1.
        if isinstance(value, SCALARS[kind]) and (kind == "bool" or not isinstance(value, bool)):
            return value
    elif kind.startswith("list[") and isinstance(value, list):
        return [convert(item, kind[5:-1]) for item in value]
    elif kind == "map" and isinstance(value, dict):
        return value
    raise TypeError(kind)


@dataclass(frozen=True)
class Fault:
    """One reason why a value is not accepted; `where` holds the keys that lead to it inside a map."""

    found: str
    expected: str
    remedy: str
    where: tuple[str, ...] = ()


class Unfit(ValueError):
    """A value that a parameter does not take, with every fault it has."""

    def __init__(self, faults: list[Fault]):
        super().__init__("; ".join(f"{fault.found}, expected {fault.expected}" for fault in faults))
        self.faults = faults


@dataclass(frozen=True)
class Parameter:
    """What a contract says of one parameter (docs/formats.md, stage.toml).

    `{recipe}` in the default of a string stands for the recipe's name.

    `also` lists values that are accepted whatever the type and the limits say. Of a list, `choices` and
    `matches` speak of every item. A map with `keys` takes only those; the value of a key is what `each`
    describes or, where there are `fields`, a map with some of them. A map with `fields` alone takes some of
    them, and the value of each is what it describes.
    """

    type: str
    doc: str = ""
    default: Any = MISSING
    choices: tuple[Any, ...] = ()
    also: tuple[Any, ...] = ()
    min: float | None = None
    max: float | None = None
    above: float | None = None
    multiple_of: int | None = None
    matches: str = ""
    # a parameter of the same stage; where that one is 0, or another is given instead of it, it sets no limit
    at_most: str = ""
    was: str = ""  # its name before: a recipe that still has it is told the new one
    renamed: dict[str, str] = field(default_factory=dict)  # a choice's name before -> its name
    instead_of: str = ""  # a parameter of the same stage; not both are given, unless this is its default
    keys: tuple[str, ...] = ()
    each: Parameter | None = None
    fields: dict[str, Parameter] = field(default_factory=dict)

    @property
    def required(self) -> bool:
        return self.default is MISSING

    def default_for(self, recipe: str) -> Any:
        """The default under the recipe of this name."""
        return self.default.replace(RECIPE, recipe) if isinstance(self.default, str) else self.default

    @property
    def expected(self) -> str:
        if self.choices:
            whole = "a list of" if self.type.startswith("list[") else "one of"
            return f"{whole} {', '.join(map(str, self.choices))}"
        limits = [f"above {self.above:g}"] if self.above is not None else []
        limits += [f"at least {self.min:g}"] if self.min is not None else []
        limits += [f"at most {self.max:g}"] if self.max is not None else []
        limits += [f"a multiple of {self.multiple_of}"] if self.multiple_of else []
        limits += [f"like {self.matches}"] if self.matches else []
        limits += [f"with keys of {', '.join(self.keys or self.fields)}"] if self.keys or self.fields else []
        also = (str(value).lower() if isinstance(value, bool) else str(value) for value in self.also)
        return " or ".join([f"{self.type} {' and '.join(limits)}".strip(), *also])

    def accept(self, value: Any) -> Any:
        """The value, converted. Raises Unfit if it is not one that this parameter takes."""
        if any(type(value) is type(other) and value == other for other in self.also):
            return value
        try:
            converted = convert(value, self.type)
        except TypeError:
            raise self._unfit(value) from None
        items = converted if isinstance(converted, list) else [converted]
        if self.choices and any(item not in self.choices for item in items):
            raise self._unfit(value)
        if self.type in ("int", "float") and not self._in_range(converted):
            raise self._unfit(value)
        if self.matches and not all(re.fullmatch(self.matches, item) for item in items):
            raise self._unfit(value)
        if self.keys:
            return self._entries(converted)
        return _record(self.fields, converted) if self.fields else converted

    def _in_range(self, number: float) -> bool:
        return not (
            (self.min is not None and number < self.min)
            or (self.max is not None and number > self.max)
            or (self.above is not None and number <= self.above)
            or (self.multiple_of and number % self.multiple_of)
        )

    def _entries(self, values: dict[Any, Any]) -> dict[str, Any]:
        """The entries of a map, each accepted. Raises Unfit with the faults of all of them."""
        accepted, faults = {}, []
        for key, value in values.items():
            if key not in self.keys:
                faults.append(
                    Fault(
                        f"unknown key {key}",
                        f"one of {', '.join(self.keys)}",
                        nearest(str(key), self.keys),
                        (str(key),),
                    )
                )
                continue
            try:
                accepted[key] = self._entry(value)
            except Unfit as unfit:
                faults += [Fault(f.found, f.expected, f.remedy, (str(key), *f.where)) for f in unfit.faults]
        if faults:
            raise Unfit(faults)
        return accepted

    def _entry(self, value: Any) -> Any:
        if not self.fields:
            return self.each.accept(value) if self.each else value
        if value == {}:
            raise Unfit([Fault("an empty map", f"one of {', '.join(self.fields)}", "")])
        if isinstance(value, dict):
            return _record(self.fields, value)
        shape = f"a map with {', '.join(self.fields)}"
        if self.each is None:
            raise Unfit([Fault(repr(value), shape, self.doc)])
        try:
            return self.each.accept(value)
        except Unfit as unfit:
            raise Unfit(
                [Fault(f.found, f"{f.expected}, or {shape}", f.remedy, f.where) for f in unfit.faults]
            ) from None

    def _unfit(self, value: Any) -> Unfit:
        new = self.renamed.get(value) if isinstance(value, str) else None
        return Unfit([Fault(repr(value), self.expected, renamed(new) if new else self.doc)])


def _record(fields: dict[str, Parameter], values: dict[Any, Any]) -> dict[str, Any]:
    """A map whose keys are `fields`, any of which may be left out. Raises Unfit."""
    accepted, faults = {}, []
    for key, value in values.items():
        if key not in fields:
            faults.append(
                Fault(
                    f"unknown key {key}",
                    f"one of {', '.join(fields)}",
                    nearest(str(key), fields),
                    (str(key),),
                )
            )
            continue
        try:
            accepted[key] = fields[key].accept(value)
        except Unfit as unfit:
            faults += [Fault(f.found, f.expected, f.remedy, (str(key), *f.where)) for f in unfit.faults]
    if faults:
        raise Unfit(faults)
    return accepted
