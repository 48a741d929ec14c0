from __future__ import annotations

from toy_fixtures import command, its

__all__ = ["command", "its"]
