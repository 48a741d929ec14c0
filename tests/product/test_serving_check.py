"""What `build.py serve` asks a server that has come up."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from forge.finding import Refused
from product import serving

CHECK = {
    "messages": [{"role": "user", "content": "Name the capital of France."}],
    "tools": [{"type": "function"}],
    "max_tokens": 48,
    "base": {"content": "Sure! **Paris**", "tool_calls": []},
    "expected": {"content": "Paris.", "tool_calls": []},
}


@pytest.fixture
def its(tmp_path):
    """`its(answer)` checks a server that gives that answer; what it was asked is in `its.asked`."""
    (tmp_path / "check.json").write_text(json.dumps(CHECK))
    (tmp_path / "serve.json").write_text(
        json.dumps(
            {
                "served_name": "nemotron-nano",
                "serves": "tuned",
                "chat_template_kwargs": {"enable_thinking": False},
            }
        )
    )

    def check(answer):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                check.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                body = json.dumps({"choices": [{"message": answer}]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *line):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            serving._check(server.server_port, tmp_path)
        finally:
            server.shutdown()
            server.server_close()

    return check


def test_the_tuned_answer_is_shown_beside_the_base_one(its, capsys):
    its({"content": "Paris is it.", "tool_calls": None})
    assert (
        capsys.readouterr().out
        == 'it answers as the tuned model: "Paris is it." (the base: "Sure! **Paris**")\n'
    )
    assert (
        its.asked.items()
        >= {
            "model": "nemotron-nano",
            "temperature": 0,
            "max_tokens": 48,
            "messages": CHECK["messages"],
            "tools": CHECK["tools"],
        }.items()
    )


@pytest.mark.trap("adapter-not-applied")
def test_a_server_that_answers_as_the_base_is_refused(its):
    with pytest.raises(Refused, match="as the base does"):
        its({"content": CHECK["base"]["content"], "tool_calls": []})


def test_a_server_that_gives_no_answer_is_refused(tmp_path, its):
    with pytest.raises(Refused, match="got no answer"):
        serving._check(1, tmp_path)  # port 1 is nobody's


def test_a_call_of_a_tool_is_an_answer(its, capsys):
    its({"content": None, "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": "{}"}}]})
    assert '"weather(...)"' in capsys.readouterr().out


def test_an_executor_that_cannot_serve_is_named():
    plain = SimpleNamespace(name="plain")
    with pytest.raises(Refused, match="found plain; expected docker or local, which can serve"):
        serving.serve(SimpleNamespace(), plain)
