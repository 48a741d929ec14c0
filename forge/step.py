"""What a recipe says of one stage, held against the contract of the stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forge.contract import Contract, nearest
from forge.needs import Needs, fitting
from forge.parameter import Fault, Unfit, renamed
from forge.reading import Reading

_RESERVED = ("inputs", "sources", "needs")


@dataclass(frozen=True)
class Step:
    """One stage of a recipe: its contract with everything the recipe says filled in."""

    name: str
    contract: Contract
    params: dict[str, Any]
    inputs: dict[str, str]  # input name -> the stage that supplies it
    sources: dict[str, tuple[Path, ...]]
    needs: Needs


def read_step(
    reading: Reading, name: str, contract: Contract, values: dict[str, Any], where: tuple[str, ...] = ()
) -> Step:
    """The stage `name` under the `values` that the recipe has for it. What is wrong with them is added to the
    findings of `reading`. `where` is the place of the values, stages.NAME by default.
    """
    where = where or ("stages", name)
    for key in values:
        if key not in contract.parameters and key not in _RESERVED:
            new = next((to for to, parameter in contract.parameters.items() if parameter.was == key), None)
            remedy = renamed(new) if new else nearest(key, [*contract.parameters, *_RESERVED])
            reading.fault((*where, key), f"unknown key {name}.{key}", f"a parameter of {name}", remedy)
    params = {}
    for key, parameter in contract.parameters.items():
        if key not in values and parameter.required:
            reading.fault(where, f"no {key} in {name}", f"{key}: {parameter.expected}", parameter.doc)
            continue
        default = parameter.default_for(str(reading.raw.get("name")))
        try:
            params[key] = parameter.accept(values.get(key, default))
        except Unfit as unfit:
            for fault in unfit.faults:
                _unfit(reading, (*where, key), name, fault)
    replaced = {
        parameter.instead_of
        for key, parameter in contract.parameters.items()
        if params.get(key, parameter.default) != parameter.default
    }
    for key, parameter in contract.parameters.items():
        limit = None if parameter.at_most in replaced else params.get(parameter.at_most)
        if limit and key in params and params[key] > limit:
            unsaid = "" if key in values else " (the default)"
            reading.fault(
                (*where, key),
                f"{name}.{key} = {params[key]!r}{unsaid}",
                f"at most {parameter.at_most}, which is {limit!r}",
                parameter.doc,
            )
        other = parameter.instead_of
        if other in values and key in values and params.get(key, parameter.default) != parameter.default:
            found = f"{name}.{key} = {params[key]!r} and {name}.{other} = {values[other]!r}"
            reading.fault(
                (*where, key),
                found,
                f"one of {key} and {other}",
                f"Leave out {other} to use {key}, or {key} to use {other}.",
            )
    inputs = {key: key for key in contract.consumes}
    for key, value in (reading.typed((*where, "inputs"), values.get("inputs") or {}, "map") or {}).items():
        if key not in contract.consumes:
            reading.fault(
                (*where, "inputs", key),
                f"unknown input {key}",
                f"an input of {name}",
                nearest(key, contract.consumes),
            )
        elif reading.typed((*where, "inputs", key), value, "str") is not None:
            inputs[key] = value
    return Step(
        name,
        contract,
        params,
        inputs,
        _sources(reading, name, contract, values),
        _needs(reading, name, contract, values),
    )


def _unfit(reading: Reading, where: tuple[str, ...], name: str, fault: Fault) -> None:
    """A finding for one fault of the parameter at `where` of the stage `name`."""
    path = ".".join((name, where[-1], *fault.where))
    found = f"unknown key {path}" if fault.found.startswith("unknown key ") else f"{path} = {fault.found}"
    reading.fault((*where, *fault.where), found, fault.expected, fault.remedy)


def _sources(
    reading: Reading, name: str, contract: Contract, values: dict[str, Any]
) -> dict[str, tuple[Path, ...]]:
    where = ("stages", name, "sources")
    given = reading.typed(where, values.get("sources") or {}, "map") or {}
    for key in given:
        if key not in contract.sources:
            reading.fault(
                (*where, key),
                f"unknown source {key}",
                f"a source of {name}",
                nearest(key, contract.sources),
            )
    sources = {}
    for key, source in contract.sources.items():
        if key not in given or given[key] in (None, [], ""):
            if not source.optional:
                reading.fault(where, f"no source {key} in {name}", f"sources: {{{key}: ...}}", source.doc)
            continue
        listed = [given[key]] if isinstance(given[key], str) else given[key]
        listed = reading.typed((*where, key), listed, "list[str]")
        if listed is None:
            continue
        if not source.many and len(listed) != 1:
            reading.fault((*where, key), f"{len(listed)} paths in {name}.sources.{key}", "exactly one")
        paths = tuple(reading.located(text) for text in listed)
        for path, text in zip(paths, listed, strict=False):
            if not path.exists():
                reading.fault(
                    (*where, key),
                    f"{text}, which does not exist",
                    f"a file or folder ({source.doc})",
                    reading.where_paths_count_from(text),
                )
        sources[key] = paths
    return sources


def _needs(reading: Reading, name: str, contract: Contract, values: dict[str, Any]) -> Needs:
    where = ("stages", name, "needs")
    given = reading.typed(where, values.get("needs") or {}, "map") or {}
    changed = fitting(
        given,
        f"{name}.needs",
        lambda key, found, expected, remedy: reading.fault((*where, key), found, expected, remedy),
    )
    return replace(contract.needs, **changed)


def beside(values: dict[str, Any], given: dict[str, Any], contract: Contract) -> dict[str, Any]:
    """The recipe's `values` of a stage that stay beside those that a variant gives.

    Of two parameters that stand instead of each other, the one that the variant gives replaces the other.
    """
    replaced = set()
    for key, parameter in contract.parameters.items():
        if key in given and given[key] != parameter.default:
            replaced.add(parameter.instead_of)
        if parameter.instead_of in given:
            replaced.add(key)
    return {key: value for key, value in values.items() if key not in replaced}
