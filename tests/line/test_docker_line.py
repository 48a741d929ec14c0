"""The small recipe in containers, served through compose to a LAN. Long: `.ci/run` calls it after it has
walked the same line by hand, and `make long`.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.executor.engine import answers
from product.loopback import opened

REPO = Path(__file__).resolve().parents[2]
HOME = Path(os.environ.get("ANNIE_HOME", REPO / ".annie"))
BUILD = [sys.executable, str(REPO / "build.py")]
LINE = ["--recipe", "tiny", "--executor", "docker"]
KEY = "k" * 32
SHORTEST = 16  # characters of a text that is looked for; shorter ones stand in any program

pytestmark = [
    pytest.mark.skipif(not answers(), reason="no Docker engine answers here"),
    pytest.mark.skipif(
        os.environ.get("ANNIE_TEST_LONG") != "1", reason="half an hour: make long, and .ci/run at its end"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def built():
    subprocess.run([*BUILD, "run", *LINE], check=True)


def artifact(stage: str) -> Path:
    shown = subprocess.run([*BUILD, "path", stage, *LINE], check=True, capture_output=True, text=True)
    return Path(shown.stdout.strip())


def test_on_a_lan_nobody_is_answered_without_the_key(tmp_path):
    file = tmp_path / "api.key"
    file.touch(0o600)
    file.write_text(KEY)
    addresses = subprocess.run(["hostname", "-I"], check=True, capture_output=True, text=True).stdout.split()
    address = next(address for address in addresses if ":" not in address)

    def status(path: str, **headers: str) -> int:
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}
        data = json.dumps(body).encode() if path.endswith("completions") else None
        headers |= {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{address}:8000{path}", data, headers)
        try:
            with opened(request, 120, here=True) as response:
                return response.status
        except urllib.error.HTTPError as fault:
            return fault.code

    listening = ["--bind", "0.0.0.0", "--api-key-file", str(file), "--detach"]
    try:
        subprocess.run([*BUILD, "serve", *LINE, *listening], check=True)
        for path in ("/v1/models", "/v1/chat/completions", "/health", "/metrics", "/docs", "/"):
            assert status(path) == status(path, Authorization=f"Bearer {KEY}x") == 401, path
        for path in ("/v1/models", "/v1/chat/completions"):
            assert status(path, Authorization=f"Bearer {KEY}") == 200, path
    finally:
        subprocess.run([*BUILD, "serve", *LINE, "--stop"], check=True)


def test_the_image_holds_no_sentence_of_a_conversation(tmp_path):
    data, package = artifact("data"), artifact("package")
    public = (package / "check.json").read_text()
    told = {
        text
        for file in ("train.jsonl", "eval.jsonl")
        for row in (data / file).read_text().splitlines()
        for text in texts(json.loads(row)["messages"])
    }
    private = {text for text in told if json.dumps(text)[1:-1] not in public}
    assert len(private) > 300
    prompt = (package / "prompt.txt").read_text().splitlines()[0]
    looked_for = (*private, prompt)
    found = {text for part in image(package, tmp_path) for text in looked_for if text.encode() in part}
    assert found == {prompt}, "the prompt shows that the search sees what is there"


def texts(messages: list[dict[str, Any]]) -> Iterator[str]:
    """What was said in a conversation, without the prompt; also the text of calls and their results."""
    for message in messages:
        calls = [json.dumps(call) for call in message.get("tool_calls") or []]
        for text in (message.get("content"), *calls):
            if message["role"] != "system" and isinstance(text, str) and len(text) >= SHORTEST:
                yield text


def image(package: Path, folder: Path) -> Iterator[bytes]:
    """The serving image's description (settings and history), and each layer on top of its environment."""
    tag = json.loads((package / "image.json").read_text())["tag"]
    environment = docker("images", "--quiet", "annie/env-vllm").split()[0]
    below = json.loads(docker("image", "inspect", "--format", "{{json .RootFS.Layers}}", environment))
    docker("save", "--output", str(folder / "image.tar"), tag)
    with tarfile.open(folder / "image.tar") as saved:

        def read(name: str) -> bytes:
            stream = saved.extractfile(name)
            assert stream
            content = stream.read()
            return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content

        (manifest,) = json.loads(read("manifest.json"))
        yield read(manifest["Config"])
        for layer in manifest["Layers"][len(below) :]:
            yield read(layer)


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], check=True, capture_output=True, text=True).stdout
