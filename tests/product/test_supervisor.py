"""stages/serving/supervisor.py: the command of serve.json, the key, the health check, and the end of every
process. The real vLLM is supervised in tests/vllm/test_vllm_front.py.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from forge.finding import Refused
from product import loopback

SUPERVISOR = Path(__file__).resolve().parents[2] / "stages" / "serving" / "supervisor.py"
KEY = "k" * 32
# Shows what it got, and starts a process of its own as vLLM starts its engine: in the same session, with an
# open pipe, and not ended with its parent.
VLLM = f"""#!{sys.executable}
import json, os, signal, subprocess, sys, time
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(json.dumps({{"argv": sys.argv[1:], "environ": dict(os.environ), "engine": engine.pid}}), flush=True)
if "--end" in sys.argv:
    status = int(sys.argv[-1])
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)
if "--deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""


@pytest.fixture
def start(tmp_path):
    """`start(*arguments, **variables)` starts the supervisor as the image does, with the `vllm` above."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(VLLM)
    program.chmod(0o755)
    serve = {
        "served_name": "nemotron-nano",
        "serves": "nvfp4",
        "port": 8000,
        "args": ["--max-model-len", "64", "--default-chat-template-kwargs", '{"a": "b c"}'],
        "env": {"CACHE": "1"},
        "front": {"running": 2},
    }
    processes = []

    def started(*arguments, serves="nvfp4", port=8000, front=serve["front"], **variables):
        described = {**serve, "serves": serves, "port": port, "front": front}
        (tmp_path / "serve.json").write_text(json.dumps(described))
        environment = {
            "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(tmp_path / "home"),
            "ANNIE_SERVING": str(tmp_path),
            "ANNIE_BIND": "127.0.0.1",
            **variables,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, str(SUPERVISOR), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield started
    for process in processes:
        if process.poll() is None:
            process.kill()


def shown(process):
    return json.loads(process.stdout.readline())


def gone(pid):
    """Whether a process ends within ten seconds. A zombie has ended."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_vllm_gets_the_flags_of_serve_json_and_the_front(start, tmp_path):
    process = start("--end", "7", ANNIE_SERVER="its-name")
    vllm = shown(process)
    assert vllm["argv"] == [
        "serve",
        "/model",
        "--host",
        "0.0.0.0",
        "--port",
        "8000",
        "--middleware",
        "stages.serving.front.Front",
        "--max-model-len",
        "64",
        "--default-chat-template-kwargs",
        '{"a": "b c"}',
        "--end",
        "7",
    ]
    assert vllm["environ"]["CACHE"] == "1" and (tmp_path / "home").is_dir()
    assert vllm["environ"]["PYTHONPATH"] == str(SUPERVISOR.parents[2])
    front = json.loads(vllm["environ"]["ANNIE_FRONT"])
    assert (front["server"], front["key_sha256"], front["running"]) == ("its-name", "", 2)


def test_the_prompt_that_chats_get_is_the_one_beside_serve_json(start, tmp_path):
    front = json.loads(
        shown(start("--end", "7", front={"default_prompt": "prompt.txt"}))["environ"]["ANNIE_FRONT"]
    )
    assert front["default_prompt"] == str(tmp_path / "prompt.txt")


def test_an_adapter_is_given_to_vllm_under_the_served_name(start):
    argv = shown(start("--end", "7", serves="tuned"))["argv"]
    assert argv[-4:-2] == ["--lora-modules", "nemotron-nano=/adapter"]


# --- the end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vllm_ends_with", "status"), [(7, 7), (0, 1), (-9, 137)])
def test_a_vllm_that_ends_by_itself_is_an_exit_status_and_leaves_no_engine(start, vllm_ends_with, status):
    process = start("--end", str(vllm_ends_with))
    engine = shown(process)["engine"]
    assert process.wait(30) == status
    assert gone(engine)
    assert "vLLM ended by itself" in process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop_it_ends_everything_and_exits_with_0(start, number):
    process = start()
    engine = shown(process)["engine"]
    process.send_signal(number)
    assert process.wait(30) == 0
    assert gone(engine)


def test_killed_it_takes_vllm_with_it(start):
    process = start()
    vllm = shown(process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    assert gone(int(children[0])), "the parent-death signal"
    os.kill(vllm["engine"], signal.SIGKILL)  # vLLM's own engine ends with its server; this one has none


# --- the key ------------------------------------------------------------------------------------------------


def test_the_key_reaches_vllm_as_a_digest_alone(start, tmp_path):
    key = tmp_path / "key"
    key.write_text(f"{KEY}\n")
    vllm = shown(start("--end", "7", ANNIE_API_KEY_FILE=str(key), ANNIE_BIND="0.0.0.0"))
    assert len(json.loads(vllm["environ"]["ANNIE_FRONT"])["key_sha256"]) == 64
    assert KEY not in json.dumps(vllm)


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "192.168.1.4", "spark.local", ""])
def test_a_server_for_other_machines_without_a_key_is_refused(start, bind):
    process = start(ANNIE_BIND=bind)
    assert process.wait(30) == 2
    assert "found no key for a server that other machines reach" in process.stderr.read()


@pytest.mark.parametrize("text", ["", "short", "k" * 20 + " " + "k" * 20, "schlüssel" * 4])
def test_a_key_that_is_none_is_refused(start, tmp_path, text):
    key = tmp_path / "key"
    key.write_text(text)
    process = start(ANNIE_API_KEY_FILE=str(key))
    assert process.wait(30) == 2
    said = process.stderr.read()
    assert f"found a key of {len(text)} characters in {key}; expected 16 or more, ASCII, no blanks" in said
    with pytest.raises(Refused) as refused:  # build.py serve says the same before anything starts
        loopback.read_key("serve", key)
    (finding,) = refused.value.findings
    assert f"found {finding.found}; expected {finding.expected}." in said
    assert start(ANNIE_API_KEY_FILE=str(tmp_path / "none")).wait(30) == 2


# --- the health check ---------------------------------------------------------------------------------------


@pytest.fixture
def port():
    """A port that answers /health, as the front does: with the key alone."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            right = self.headers["Authorization"] == f"Bearer {KEY}" and self.path == "/health"
            self.send_response(200 if right else 401)
            self.end_headers()

        def log_message(self, *line):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_healthy_is_0_beside_a_server_that_answers(start, port, tmp_path):
    (tmp_path / "key").write_text(KEY)
    assert start("--healthy", port=port, ANNIE_API_KEY_FILE=str(tmp_path / "key")).wait(30) == 0


def test_healthy_is_1_without_a_server_and_without_the_key(start, port):
    assert start("--healthy", port=1).wait(30) == 1  # port 1 is nobody's
    assert start("--healthy", port=port).wait(30) == 1


def test_healthy_asks_no_proxy(start, port):
    """A proxy that answers everything would make a dead server healthy."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *line):
            pass

    proxy = HTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{proxy.server_port}"
    assert start("--healthy", port=1, http_proxy=address, HTTP_PROXY=address).wait(30) == 1
    proxy.shutdown()
    proxy.server_close()


def test_what_the_dockerfile_copies_is_what_the_supervisor_reads():
    lines = (SUPERVISOR.parents[2] / "images" / "serve" / "Dockerfile").read_text()
    assert (
        " /model/\n" in lines
        and " /adapter/\n" in lines
        and " /opt/annie/serving/server/stages/serving/\n" in lines
    )
    assert 'ENTRYPOINT ["python3", "/opt/annie/serving/server/stages/serving/supervisor.py"]' in lines
    assert '"/opt/annie/serving/server/stages/serving/supervisor.py", "--healthy"]' in lines


def test_the_first_line_says_what_is_served(start):
    process = start(ANNIE_ORIGIN="recipe toy, key 0123456789ab, made 2026-11-28 06:50 UTC")
    assert process.stdout.readline() == "serve: recipe toy, key 0123456789ab, made 2026-11-28 06:50 UTC\n"
    process.terminate()
    process.communicate(timeout=60)
