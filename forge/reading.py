"""One YAML file as it is read: its values, the line of every key, and what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from forge.contract import convert
from forge.finding import Finding, Refused, error


class Reading:
    """`raw` holds the values of the file at `path`, in the repository `repo`, and `content` its bytes.
    `findings` grows on the way. Refused if the file is not YAML.
    """

    def __init__(self, path: Path, repo: Path):
        self.path, self.repo = path, repo
        self.findings: list[Finding] = []
        self.lines: dict[tuple[str, ...], int] = {}
        self.content = path.read_bytes()
        self.raw = self._parse()

    def _parse(self) -> dict[str, Any]:
        try:
            loader = yaml.SafeLoader(self.content)
            root = loader.get_single_node()
        except yaml.YAMLError as fault:
            problem = getattr(fault, "problem", None) or str(fault)
            mark = getattr(fault, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise Refused(
                error(
                    f"{self.path.name}{line}",
                    f"a fault of syntax: {problem.removeprefix('found ')}",
                    "YAML",
                    "YAML takes no tabs: indent with blanks." if "'\\t'" in problem else "Mend that line.",
                )
            ) from fault
        if not isinstance(root, yaml.MappingNode):
            raise Refused(error(self.path.name, "no mapping", "keys such as name and stages", ""))
        values: dict[str, Any] = self._value(loader, root, ())
        return values

    def _value(self, loader: yaml.SafeLoader, node: yaml.Node, where: tuple[str, ...]) -> Any:
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(loader.construct_object(key_node, deep=True))
                if key in values:
                    first = self.lines[(*where, key)]
                    self.findings.append(
                        error(
                            f"{self.path.name}:{key_node.start_mark.line + 1}",
                            f"{key} a second time",
                            f"each key once (the first is in line {first})",
                            "Remove one of the two.",
                        )
                    )
                self.lines[(*where, key)] = key_node.start_mark.line + 1
                values[key] = self._value(loader, value_node, (*where, key))
            return values
        return loader.construct_object(node, deep=True)

    def fault(self, where: tuple[str, ...], found: str, expected: str, remedy: str = "") -> None:
        """Adds a finding about the key at `where`, with its line or that of the nearest key around it."""
        known = where
        while known and known not in self.lines:
            known = known[:-1]
        line = f":{self.lines[known]}" if known else ""
        self.findings.append(error(f"{self.path.name}{line}", found, expected, remedy))

    def located(self, text: str) -> Path:
        """The absolute path that `text` names: counted from the folder of the file, `~` from the user's."""
        return Path(os.path.normpath(self.path.absolute().parent / os.path.expanduser(text)))

    def where_paths_count_from(self, text: str) -> str:
        """The remedy for a path that is not there; if it is there from the repository's root, with the
        spelling to write now.
        """
        folder, from_root = self.path.absolute().parent, self.repo.absolute() / text
        if not from_root.exists():
            return f"Paths count from the recipe's folder, {folder}."
        inside = folder.is_relative_to(self.repo.absolute())
        now = os.path.relpath(from_root, folder) if inside else from_root
        return f"Paths count from the recipe's file and not from the repository's root: write {now}"

    def typed(self, where: tuple[str, ...], value: Any, kind: str) -> Any:
        """`value` as a `kind` (forge/parameter.py); None, and a finding, if it is none."""
        try:
            return convert(value, kind)
        except TypeError:
            self.fault(where, f"{'.'.join(where)} = {value!r}", kind, "")
            return None


def raw_name(path: Path) -> str:
    """The name that a recipe gives itself, whatever else is wrong with it; its file's name if it has none."""
    try:
        raw = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError):
        raw = None
    return str(raw.get("name") or path.stem) if isinstance(raw, dict) else path.stem
