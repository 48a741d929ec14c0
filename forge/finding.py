"""What is wrong, as a value: found, expected, remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    level: Literal["error", "warning", "note"]
    subject: str
    found: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        text = f"{self.subject}: found {self.found}; expected {self.expected}"
        return f"{text}. {self.remedy}" if self.remedy else text

    def as_values(self) -> dict[str, str]:
        """The texts, as events and JSON output have them."""
        return {name: getattr(self, name) for name in ("subject", "found", "expected", "remedy")}


def error(subject: str, found: str, expected: str, remedy: str = "") -> Finding:
    return Finding("error", subject, found, expected, remedy)


def warning(subject: str, found: str, expected: str, remedy: str = "") -> Finding:
    return Finding("warning", subject, found, expected, remedy)


def note(subject: str, said: str) -> Finding:
    """What was decided and why, as a whole sentence."""
    return Finding("note", subject, said, "", "")


class Refused(Exception):
    """Work that cannot start or go on; carries every finding at once, never just the first."""

    def __init__(self, findings: Finding | Iterable[Finding]):
        self.findings = [findings] if isinstance(findings, Finding) else list(findings)
        super().__init__("\n".join(str(f) for f in self.findings))
