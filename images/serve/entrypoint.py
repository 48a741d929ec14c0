"""Starts vLLM with the flags of serve.json. Further arguments go to `vllm serve` after them; --healthy
asks a running one.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

SERVING = Path(os.environ.get("ANNIE_SERVING", "/opt/annie/serving"))
MODEL = os.environ.get("ANNIE_MODEL", "/model")
ADAPTER = "/adapter"


def main(arguments: list[str]) -> int:
    """The exit status of a health check; anything else becomes vLLM and does not return."""
    serve = json.loads((SERVING / "serve.json").read_text())
    if arguments == ["--healthy"]:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{serve['port']}/health", timeout=4).close()
        except (OSError, urllib.error.URLError):
            return 1
        return 0
    os.makedirs(os.environ["HOME"], exist_ok=True)
    os.environ.update(serve["env"])
    adapter = ["--lora-modules", f"{serve['served_name']}={ADAPTER}"] if serve["serves"] == "tuned" else []
    command = [
        "vllm",
        "serve",
        MODEL,
        "--host",
        "0.0.0.0",
        "--port",
        str(serve["port"]),
        *serve["args"],
        *adapter,
        *arguments,
    ]
    return os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
