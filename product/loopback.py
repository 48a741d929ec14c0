"""HTTP to a server on this machine. A proxy never sees it: the requests hold private conversations, and a
proxy could answer for a server that is not there.
"""

from __future__ import annotations

import ipaddress
import urllib.parse
import urllib.request
from http.client import HTTPResponse
from pathlib import Path

from forge.finding import Refused, error

SHORTEST_KEY = 16  # characters, as in stages/serving/supervisor.py
_MAKE = "Make one: (umask 077; openssl rand -hex 32 > api.key)."


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def opened(request: urllib.request.Request, seconds: float, here: bool = False) -> HTTPResponse:
    """The open answer to a request, without a proxy where it goes to this machine: by its name or address, or
    because the caller knows it (`here`). OSError if there is none, or one with an error status
    (urllib.error.HTTPError).
    """
    host = urllib.parse.urlsplit(request.full_url).hostname or ""
    handlers = [urllib.request.ProxyHandler({})] if here or is_loopback(host) else []
    answer: HTTPResponse = urllib.request.build_opener(*handlers).open(request, timeout=seconds)
    return answer


def read_key(subject: str, file: Path) -> str:
    """The key that clients send, from its file. Refused, for the command `subject`, if it cannot be read or
    is none that the served model's supervisor takes.
    """
    try:
        key = file.read_text().strip()
    except (OSError, ValueError) as fault:
        raise Refused(
            error(subject, f"no readable key ({fault})", "a file with one line of text", _MAKE)
        ) from fault
    if len(key) < SHORTEST_KEY or not key.isascii() or any(c.isspace() for c in key):
        raise Refused(
            error(
                subject,
                f"a key of {len(key)} characters in {file}",
                f"{SHORTEST_KEY} or more, ASCII, no blanks",
                _MAKE,
            )
        )
    return key
