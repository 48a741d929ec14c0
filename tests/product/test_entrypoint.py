"""images/serve/entrypoint.py: the command of serve.json, and the health check."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ENTRYPOINT = Path(__file__).resolve().parents[2] / "images" / "serve" / "entrypoint.py"
SHOWS = f"""#!{sys.executable}
import json, os, sys
print(json.dumps({{"argv": sys.argv[1:], "cache": os.environ.get("CACHE"), "pid": os.getpid()}}))
sys.exit(7)
"""


@pytest.fixture
def its(tmp_path):
    """`its(arguments, port)` starts the entrypoint as the image does, with a `vllm` that shows what it
    got.
    """
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(SHOWS)
    program.chmod(0o755)

    def start(*arguments, port=8000, serves="nvfp4"):
        serve = {
            "served_name": "its-name",
            "serves": serves,
            "port": port,
            "args": ["--max-model-len", "64", "--default-chat-template-kwargs", '{"a": "b c"}'],
            "env": {"CACHE": "1"},
        }
        (tmp_path / "serve.json").write_text(json.dumps(serve))
        environment = {
            "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(tmp_path / "home"),
            "ANNIE_SERVING": str(tmp_path),
        }
        process = subprocess.Popen(
            [sys.executable, str(ENTRYPOINT), *arguments], env=environment, stdout=subprocess.PIPE, text=True
        )
        out, _ = process.communicate(timeout=30)
        return process.pid, process.returncode, out

    return start


def test_vllm_replaces_the_entrypoint_with_the_flags_of_serve_json(its, tmp_path):
    pid, code, out = its("--max-num-seqs", "2")
    shown = json.loads(out)
    assert shown["argv"] == [
        "serve",
        "/model",
        "--host",
        "0.0.0.0",
        "--port",
        "8000",
        "--max-model-len",
        "64",
        "--default-chat-template-kwargs",
        '{"a": "b c"}',
        "--max-num-seqs",
        "2",
    ]
    assert shown["cache"] == "1" and (tmp_path / "home").is_dir()
    # the same process: signals reach vLLM, its exit status reaches the engine
    assert shown["pid"] == pid and code == 7


def test_an_adapter_is_given_to_vllm_under_the_served_name(its):
    argv = json.loads(its(serves="tuned")[2])["argv"]
    assert argv[-2:] == ["--lora-modules", "its-name=/adapter"]


@pytest.fixture
def port():
    """A port that answers /health and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *line):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_healthy_is_0_beside_a_server_that_answers(its, port):
    assert its("--healthy", port=port)[1:] == (0, "")


def test_healthy_is_1_without_a_server(its):
    assert its("--healthy", port=1)[1:] == (1, "")  # port 1 is nobody's


def test_what_the_dockerfile_copies_is_what_the_entrypoint_reads():
    lines = (ENTRYPOINT.parent / "Dockerfile").read_text()
    assert (
        " /model/\n" in lines
        and " /adapter/\n" in lines
        and " /opt/annie/serving/\n" in lines
        and "HOME=" in lines
    )
    assert (
        'ENTRYPOINT ["python3", "/opt/annie/entrypoint.py"]' in lines
        and '"/opt/annie/entrypoint.py", "--healthy"]' in lines
    )
