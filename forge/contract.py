"""A stage's contract, `stages/<name>/stage.toml`: what it takes, what it gives, what it needs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge import artifact_types, toml_file
from forge.finding import Finding, Refused, error
from forge.needs import Needs, fitting
from forge.parameter import TYPES as PARAMETER_TYPES
from forge.parameter import Parameter, Unfit, convert, nearest

__all__ = ["Contract", "Parameter", "Unfit", "convert", "load", "nearest"]


@dataclass(frozen=True)
class Source:
    doc: str = ""
    many: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Secret:
    """`variable` and `files` are where it is looked for if the recipe names no file (forge/secret.py)."""

    doc: str = ""
    variable: str = ""
    files: tuple[str, ...] = ()


_PLACEHOLDER = re.compile(r"\{(\w+)\}")  # in [build]'s tag


@dataclass(frozen=True)
class Product:
    """An image made from the stage's output (`[build]`): the folder of images/ that it is made with, what it
    is called (`{PARAMETER}` stands for a parameter's value), and for each value of the parameter `by` context
    name -> input name, or a folder in it.
    """

    image: str
    tag: str
    by: str
    contexts: dict[str, dict[str, str]]

    def repository(self, params: dict[str, Any]) -> str:
        """The image's name without a version; engines take lower case alone."""
        return _PLACEHOLDER.sub(lambda match: str(params[match[1]]), self.tag).lower()

    def folders(self, params: dict[str, Any], folder: Callable[[str], Path]) -> dict[str, Path | None]:
        """Context name -> folder under these parameters, None for a context that only other values have;
        `folder` gives that of an input.
        """
        chosen = {context: place.partition("/") for context, place in self.contexts[params[self.by]].items()}
        return dict.fromkeys(name for contexts in self.contexts.values() for name in contexts) | {
            context: folder(supplier) / below for context, (supplier, _, below) in chosen.items()
        }


@dataclass(frozen=True)
class Contract:
    name: str
    folder: Path
    summary: str
    image: str
    produces: str
    files: tuple[str, ...]  # patterns of which each must match a file of the output
    consumes: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    secrets: dict[str, Secret] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)
    product: Product | None = None
    # a module that looks at the stage's sources before any stage runs (forge/check.py)
    check: str | None = None
    was: str = ""  # its name before: who still says that is told the new one
    # modules of the stage's folder that can be started too and decide nothing of its output
    apart: tuple[str, ...] = ()
    # whether it is given its newest artifact, to take from it what it can prove to be right
    previous: bool = False


def _product(
    name: str,
    raw: dict[str, Any],
    parameters: dict[str, Parameter],
    consumes: dict[str, str],
    findings: list[Finding],
) -> Product | None:
    if set(raw) != {"image", "tag", "by", "contexts"} or not isinstance(raw["contexts"], dict):
        findings.append(
            error(
                name,
                f"[build] with {', '.join(raw) or 'nothing'}",
                "image, tag, by and contexts",
                "docs/formats.md says what it holds.",
            )
        )
        return None
    for key in _PLACEHOLDER.findall(raw["tag"]):
        if key not in parameters:
            findings.append(
                error(name, f"{key} in build.tag", "a parameter of the stage", nearest(key, parameters))
            )
    choices = parameters[raw["by"]].choices if raw["by"] in parameters else ()
    if set(choices) != set(raw["contexts"]):
        findings.append(
            error(
                name,
                f"build.contexts for {', '.join(raw['contexts'])}",
                f"one for each choice of the parameter {raw['by']}: {', '.join(choices) or 'none'}",
                "",
            )
        )
    for contexts in raw["contexts"].values():
        for place in contexts.values():
            if (supplier := place.partition("/")[0]) not in consumes:
                findings.append(
                    error(
                        name,
                        f"{supplier} in build.contexts",
                        "an input of [consumes]",
                        nearest(supplier, consumes),
                    )
                )
    return Product(**raw)


def _files(secret: Any) -> dict[str, tuple[str, ...]]:
    """The list `files` of a secret's table as a frozen one; nothing where there is none."""
    return {"files": tuple(secret["files"])} if isinstance(secret, dict) and "files" in secret else {}


_KEYS = {
    "summary": str,
    "image": str,
    "produces": str,
    "consumes": dict,
    "sources": dict,
    "secrets": dict,
    "parameters": dict,
    "needs": dict,
    "build": dict,
    "check": str,
    "apart": list,
    "previous": bool,
    "was": str,
}


def load(folder: Path, types: artifact_types.Types) -> Contract:
    """Reads `folder/stage.toml`; `types` are those of the repository. Refused with every fault it has."""
    name = f"stages/{folder.name}/stage.toml"
    raw = toml_file.read(folder / "stage.toml", name, "the contract of the stage")
    findings: list[Finding] = []
    for key, value in raw.items():
        if key not in _KEYS:
            findings.append(error(name, f"unknown key {key}", "a key of a contract", nearest(key, _KEYS)))
        elif not isinstance(value, _KEYS[key]):
            expected = {dict: "a table", list: "a list of strings", str: "a string", bool: "true or false"}[
                _KEYS[key]
            ]
            findings.append(error(name, f"{key} = {value!r}", expected, ""))
    for key in ("summary", "image", "produces"):
        if key not in raw:
            findings.append(error(name, f"no {key}", f'{key} = "..."', "Add it."))
    if findings:
        raise Refused(findings)
    for owner, kind in [
        ("produces", raw["produces"]),
        *((f"consumes.{k}", v) for k, v in raw.get("consumes", {}).items()),
    ]:
        if not isinstance(kind, str) or kind not in types:
            expected = f"an artifact type of {artifact_types.FILE}"
            findings.append(error(name, f"{owner} = {kind!r}", expected, nearest(str(kind), types)))

    def table(kind: type, where: str, values: Any, **renamed: Any) -> Any:
        allowed = [entry.name for entry in dataclasses.fields(kind)]
        if not isinstance(values, dict):
            findings.append(error(name, f"{where} = {values!r}", "a table", ""))
            return kind(**renamed)
        unknown = [key for key in values if key not in allowed]
        for key in unknown:
            findings.append(
                error(name, f"unknown key {where}.{key}", "a key of this table", nearest(key, allowed))
            )
        return kind(**{**{k: v for k, v in values.items() if k not in unknown}, **renamed})

    def described(where: str, values: Any) -> Parameter | None:
        """The parameter of one table, with those of the tables inside it; None, and a finding, if its type
        is unknown.
        """
        kind = values.get("type") if isinstance(values, dict) else None
        if kind not in PARAMETER_TYPES:
            findings.append(
                error(name, f"{where}.type = {kind!r}", "one of " + ", ".join(PARAMETER_TYPES), "")
            )
            return None
        inner = {
            key: described(f"{where}.fields.{key}", below) for key, below in values.get("fields", {}).items()
        }
        parameter: Parameter = table(
            Parameter,
            where,
            values,
            **{key: tuple(values.get(key, ())) for key in ("choices", "also", "keys")},
            each=described(f"{where}.each", values["each"]) if "each" in values else None,
            fields={key: below for key, below in inner.items() if below},
        )
        if not parameter.required:
            try:
                parameter.accept(parameter.default_for("recipe"))
            except Unfit as unfit:
                findings.append(
                    error(name, f"{where}.default = {parameter.default!r}", unfit.faults[0].expected, "")
                )
        return parameter

    read = {key: described(f"parameters.{key}", values) for key, values in raw.get("parameters", {}).items()}
    parameters = {key: parameter for key, parameter in read.items() if parameter}
    for key, parameter in parameters.items():
        if parameter.at_most and (
            parameter.at_most not in parameters or parameters[parameter.at_most].type not in ("int", "float")
        ):
            findings.append(
                error(
                    name,
                    f"parameters.{key}.at_most = {parameter.at_most!r}",
                    "a number among the stage's parameters",
                    nearest(parameter.at_most, parameters),
                )
            )
        if parameter.instead_of and (parameter.instead_of not in parameters or parameter.required):
            findings.append(
                error(
                    name,
                    f"parameters.{key}.instead_of = {parameter.instead_of!r}",
                    "another of the stage's parameters, and a default for this one",
                    nearest(parameter.instead_of, parameters),
                )
            )
    if "check" in raw and not raw["check"].startswith(f"stages.{folder.name}."):
        findings.append(
            error(
                name,
                f"check = {raw['check']!r}",
                f"a module of this stage, such as stages.{folder.name}.sources",
                "",
            )
        )
    for module in raw.get("apart", []):
        if not isinstance(module, str) or not (folder / module).is_file():
            findings.append(error(name, f"{module!r} in apart", f"a file in stages/{folder.name}", ""))
    sources = {key: table(Source, f"sources.{key}", values) for key, values in raw.get("sources", {}).items()}
    secrets = {
        key: table(Secret, f"secrets.{key}", values, **_files(values))
        for key, values in raw.get("secrets", {}).items()
    }
    needs = fitting(
        raw.get("needs", {}),
        "needs",
        lambda key, found, expected, remedy: findings.append(error(name, found, expected, remedy)),
    )
    product = (
        _product(name, raw["build"], parameters, raw.get("consumes", {}), findings)
        if "build" in raw
        else None
    )
    if findings:
        raise Refused(findings)
    return Contract(
        name=folder.name,
        folder=folder,
        summary=raw["summary"],
        image=raw["image"],
        produces=raw["produces"],
        files=types[raw["produces"]],
        consumes=raw.get("consumes", {}),
        sources=sources,
        secrets=secrets,
        parameters=parameters,
        needs=Needs(**needs),
        product=product,
        check=raw.get("check"),
        was=raw.get("was", ""),
        apart=tuple(raw.get("apart", ())),
        previous=raw.get("previous", False),
    )
