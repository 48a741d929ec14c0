"""What `build.py serve` asks a server that has come up: who it is, and whether it behaves as taught."""

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import http_server
import pytest

from forge.finding import Refused
from product import SERVER, serving, serving_check
from product.serving_check import Endpoint

PROGRAMS = Path(__file__).resolve().parents[2] / "stages" / "serving"
KEY = "k" * 32
CHECK = {
    "messages": [{"role": "user", "content": "Name the capital of France."}],
    "tools": [{"type": "function", "function": {"name": "weather"}}],
    "max_tokens": 48,
    "expect": {"no_tool": True, "max_words": 20, "must_say": ["Paris"]},
    "base": {"content": "Sure! **Paris**", "tool_calls": []},
    "expected": {"content": "Paris.", "tool_calls": []},
}


@pytest.fixture
def artifact(tmp_path):
    """A serving artifact with the question above, and the evaluation's own checks."""
    shutil.copytree(PROGRAMS, tmp_path / SERVER, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "check.json").write_text(json.dumps(CHECK))
    server = {
        "served_name": "nemotron-nano",
        "serves": "tuned",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    (tmp_path / "serve.json").write_text(json.dumps(server))
    return tmp_path


def files(folder):
    return sorted(folder.rglob("*"))


@pytest.fixture
def checked(artifact):
    """`checked(message)` checks a server that gives that answer; what it was asked is `checked.asked`."""

    def check(message):
        def answer(handler):
            check.asked = json.loads(handler.asked)
            check.key = handler.headers["Authorization"]
            choice = {"message": message, "finish_reason": "stop"}
            handler.reply(200, json.dumps({"choices": [choice]}).encode())

        with http_server.serving(answer) as port:
            return serving_check.check(Endpoint(port, KEY, "its-name"), artifact)

    return check


def test_the_tuned_answer_is_shown_beside_the_base_one(checked):
    assert (
        checked({"content": "Paris it is.", "tool_calls": None})
        == 'it answers as the tuned model: "Paris it is." (the base: "Sure! **Paris**")'
    )
    expected = {
        "model": "nemotron-nano",
        "temperature": 0,
        "max_tokens": 48,
        "messages": CHECK["messages"],
        "tools": CHECK["tools"],
    }
    assert checked.asked.items() >= expected.items()
    assert checked.key == f"Bearer {KEY}"


@pytest.mark.trap("adapter-not-applied")
def test_a_server_that_answers_as_the_base_is_refused(checked):
    with pytest.raises(Refused, match="which the base answers too"):
        checked({"content": CHECK["base"]["content"], "tool_calls": []})


CALL = {"id": "1", "function": {"name": "weather", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"content": "Sure! **Paris** 🎉"}, "markdown"),  # the base's manners in other words
        ({"content": "I do not know."}, "fabrication"),  # some other model
        ({"content": None, "tool_calls": [CALL]}, "wrong_tool"),
    ],
)
def test_an_answer_that_fails_the_questions_own_checks_is_refused(checked, message, why):
    with pytest.raises(Refused, match=why):
        checked(message)


def test_the_settings_of_the_evaluation_travel_with_the_question(artifact, checked):
    loose = {"checks": {"markdown": False, "follow_up": {"question_marks": 1}}, "regex": ["Paris"]}
    before = files(artifact)
    (artifact / "check.json").write_text(json.dumps(CHECK | {"expect": loose}))
    assert checked({"content": "**Paris**, and you?"}).startswith("it answers as the tuned model")
    with pytest.raises(Refused, match="form"):
        checked({"content": "**Lyon**, and you?"})
    assert files(artifact) == before  # an artifact is never changed


def test_a_server_that_gives_no_answer_is_refused(artifact):
    with pytest.raises(Refused, match="got no answer"):
        serving_check.check(Endpoint(1, "", "its-name"), artifact)  # port 1 is nobody's


def test_without_a_public_question_the_check_says_that_it_was_left_out(artifact):
    (artifact / "check.json").write_text(json.dumps({"left_out": "no question is public"}))
    assert serving_check.check(Endpoint(1, "", "x"), artifact) == "not checked: no question is public"


# --- who answers --------------------------------------------------------------------------------------------


def waited(endpoint, why_dead=lambda: None):
    serving_check.wait(endpoint, why_dead, lambda passed: None)


@pytest.mark.trap("another-server-answers")
@pytest.mark.parametrize(
    ("headers", "who"), [({}, "another program"), ({"x_annie_server": "older"}, "the server older")]
)
def test_another_program_on_the_port_is_not_taken_for_the_server(headers, who):
    with (
        http_server.serving(lambda handler: handler.reply(200, b"ok", **headers)) as port,
        pytest.raises(Refused, match=f", on which {who} answers"),
    ):
        waited(Endpoint(port, "", "newer"))


def test_the_server_is_known_by_its_name_and_asked_with_its_key():
    def answer(handler):
        right = handler.headers["Authorization"] == f"Bearer {KEY}"
        handler.reply(200 if right else 401, x_annie_server="newer")

    with http_server.serving(answer) as port:
        waited(Endpoint(port, KEY, "newer"))


def test_a_server_that_died_is_refused_with_its_reason():
    with pytest.raises(Refused, match="vLLM ended with 1"):
        waited(Endpoint(1, "", "newer"), lambda: "vLLM ended with 1; see serving.log")


@pytest.mark.trap("another-server-answers")
def test_a_proxy_sees_nothing(artifact, monkeypatch):
    """Neither the question nor the key; and one that answers for a dead server is not believed."""
    seen = []

    def proxy(handler):
        seen.append(handler.path)
        handler.reply(200, b"{}", x_annie_server="newer")

    with http_server.serving(proxy) as port:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        with pytest.raises(Refused, match="gone"):
            serving_check.wait(Endpoint(1, KEY, "newer"), iter([None, "gone"]).__next__, lambda passed: None)
        with pytest.raises(Refused, match="got no answer"):
            serving_check.check(Endpoint(1, KEY, "newer"), artifact)
    assert seen == []


# --- before it starts ---------------------------------------------------------------------------------------


@pytest.mark.trap("another-server-answers")
def test_a_port_that_is_taken_is_refused_before_anything_loads():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(Refused, match=f"port {port}, which cannot be used"):
            serving_check.refuse_taken("127.0.0.1", port, "Stop it.")
    serving_check.refuse_taken("127.0.0.1", port, "Stop it.")


def test_another_address_than_loopback_needs_a_key(tmp_path):
    with pytest.raises(Refused, match="--bind 0.0.0.0 without a key"):
        serving.Address(bind="0.0.0.0").key()
    (tmp_path / "key").write_text(KEY + "\n")
    assert serving.Address(bind="0.0.0.0", key_file=tmp_path / "key").key() == KEY
    assert serving.Address().key() == serving.Address(bind="::1").key() == ""


def test_an_executor_that_cannot_serve_is_named():
    plain = SimpleNamespace(name="plain")
    with pytest.raises(Refused, match="found plain; expected docker or local, which can serve"):
        serving.serve(SimpleNamespace(), plain, serving.Address())


def test_a_record_of_another_process_is_not_alive(tmp_path):
    from product import serving_record

    record = serving_record.Record("folder", 1, "a-name", 1)
    serving_record.write(tmp_path, record)
    assert serving_record.read(tmp_path) == record and not record.alive()
    for text in ("", "{", "[]", '{"folder": 1}', "null"):
        (tmp_path / serving_record.FILE).write_text(text)
        assert serving_record.read(tmp_path) is None
