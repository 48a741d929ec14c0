from __future__ import annotations

from toy_fixtures import command, mini

__all__ = ["command", "mini"]
