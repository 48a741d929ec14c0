"""The chat against a small HTTP server that streams as vLLM does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
DELTAS = [
    {"role": "assistant", "content": ""},
    {"content": "Timer [is] "},
    {"content": "set."},
    {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "set_timer", "arguments": '{"min'}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": 'utes": 5}'}}]},
]


@pytest.fixture
def server():
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            for delta in DELTAS:
                self.wfile.write(b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_):
            pass

    its = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=its.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{its.server_port}", asked
    its.shutdown()


def test_a_piped_chat_streams_shows_tool_calls_and_keeps_the_history(server, tmp_path):
    url, asked = server
    folder = tmp_path / "store/artifacts/package/k"
    folder.mkdir(parents=True)
    (folder / "prompt.txt").write_text("You are Annie.\n")
    (folder / "tools.json").write_text('[{"type": "function", "function": {"name": "set_timer"}}]')
    (folder / "serve.json").write_text(
        '{"served_name": "nemotron-nano", "chat_template_kwargs": {"enable_thinking": false}}'
    )
    said = subprocess.run(
        [sys.executable, str(REPO / "build.py"), "chat", "--url", url],
        input="five minutes\nthanks\n/reset\nagain\n",
        text=True,
        capture_output=True,
        env={**os.environ, "ANNIE_HOME": str(tmp_path)},
    )
    assert said.returncode == 0, said.stderr
    assert "Timer [is] set." in said.stdout and "-> set_timer(minutes=5)" in said.stdout
    assert [len(body["messages"]) for body in asked] == [2, 5, 2]
    assert asked[0]["messages"][0] == {"role": "system", "content": "You are Annie."}
    assert asked[0]["tools"] and asked[0]["chat_template_kwargs"] == {"enable_thinking": False}
