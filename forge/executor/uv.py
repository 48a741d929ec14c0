"""The Pythons that uv finds on this machine, or could fetch."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Any

_FETCH_SECONDS = 10


@dataclass(frozen=True)
class Uv:
    """`command` starts uv; the one of this Python's environment by default."""

    command: list[str] = field(default_factory=lambda: [sys.executable, "-m", "uv"])

    def find(self, version: str) -> str | None:
        """The path of an installed CPython of this version (`3.11`), not one of a virtual environment;
        None where there is none.
        """
        done = self._ask(
            "python", "find", "--system", "--no-project", "--no-python-downloads", f"cpython-{version}"
        )
        return done.stdout.strip() if done.returncode == 0 else None

    def installed(self) -> list[str]:
        """Versions of the installed CPythons, newest first."""
        done = self._ask("python", "list", "--only-installed", "--output-format=json")
        listed: list[dict[str, Any]] = json.loads(done.stdout) if done.returncode == 0 else []
        return list(
            dict.fromkeys(entry["version"] for entry in listed if entry.get("implementation") == "cpython")
        )

    def unreachable(self, version: str) -> str | None:
        """Why uv cannot fetch a CPython of this version; None if it can. Asks for the file's headers and
        downloads nothing.
        """
        done = self._ask("python", "list", "--only-downloads", "--output-format=json", f"cpython-{version}")
        listed: list[dict[str, Any]] = json.loads(done.stdout) if done.returncode == 0 else []
        urls = [entry["url"] for entry in listed if entry.get("url")]
        if not urls:
            return f"it knows no download of Python {version}, or downloads are off"
        try:
            urllib.request.urlopen(
                urllib.request.Request(urls[0], method="HEAD"), timeout=_FETCH_SECONDS
            ).close()
        except (OSError, ValueError) as fault:  # URLError and HTTPError are OSErrors
            return f"{urllib.parse.urlsplit(urls[0]).hostname}: {fault}"
        return None

    def _ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.command, *words], capture_output=True, text=True)
