"""What one run of a stage takes: the table `needs` of a contract, and of a recipe that says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forge.parameter import convert, nearest


@dataclass(frozen=True)
class Needs:
    """What one run takes; `gpu` says that the stage uses the GPU where the recipe has one.

    `memory_gb` and `pids` (processes and threads) are also the limits of its container.
    """

    gpu: bool = False
    network: bool = False
    memory_gb: float = 1.0
    pids: int = 4096
    disk_gb: float = 0.1
    minutes: float = 1.0


# key -> its type, and the smallest value. To an engine a limit of 0 is none.
NEEDS: dict[str, tuple[str, float]] = {
    "gpu": ("bool", 0),
    "network": ("bool", 0),
    "memory_gb": ("float", 0.1),
    "pids": ("int", 64),
    "disk_gb": ("float", 0),
    "minutes": ("float", 0),
}


def fitting(
    values: dict[str, Any], where: str, fault: Callable[[str, str, str, str], None]
) -> dict[str, Any]:
    """The values that `Needs` takes. `fault` is told the key, found, expected and remedy of each other one;
    `where` is what the table is called there.
    """
    fit = {}
    for key, value in values.items():
        if key not in NEEDS:
            fault(key, f"unknown key {where}.{key}", "a key of needs", nearest(key, NEEDS))
            continue
        kind, least = NEEDS[key]
        found = f"{where}.{key} = {value!r}"
        try:
            number = convert(value, kind)
        except TypeError:
            fault(key, found, kind, "")
            continue
        if number < least:
            fault(key, found, f"{least:g} or more", "")
            continue
        fit[key] = number
    return fit
