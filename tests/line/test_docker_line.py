"""The small recipe in containers, to an answer through compose. Long: part of `make long` (.ci/run does
the same by hand).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from forge.executor.engine import answers

REPO = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(not answers(), reason="no Docker engine answers here"),
    pytest.mark.skipif(
        os.environ.get("ANNIE_TEST_LONG") != "1",
        reason="half an hour: make long; .ci/run walks this line by hand",
    ),
]


def test_the_small_recipe_in_containers_is_served_by_compose():
    build = [sys.executable, str(REPO / "build.py")]
    subprocess.run([*build, "run", "--recipe", "tiny", "--executor", "docker"], check=True)
    try:
        subprocess.run([*build, "serve", "--recipe", "tiny", "--executor", "docker", "--detach"], check=True)
        body = {
            "model": "nemotron-nano",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 16,
        }
        request = urllib.request.Request(
            "http://127.0.0.1:8000/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            assert json.load(response)["choices"][0]["message"]
    finally:
        subprocess.run(["docker", "compose", "down"], cwd=REPO, check=True)
    home = Path(os.environ.get("ANNIE_HOME", REPO / ".annie"))
    foreign = [path for path in home.rglob("*") if path.lstat().st_uid != os.getuid()]
    assert foreign == []
