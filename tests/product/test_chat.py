"""The chat against a small HTTP server that streams as vLLM does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import http_server
import pytest

REPO = Path(__file__).resolve().parents[2]
DELTAS = [
    {"role": "assistant", "content": ""},
    {"content": "Timer [is] "},
    {"content": "set."},
    {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "set_timer", "arguments": '{"min'}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": 'utes": 5}'}}]},
]
DONE = b"data: [DONE]\n\n"


def event(delta, reason=None):
    choice = {"delta": delta, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


@pytest.fixture
def chat(tmp_path):
    """`chat(stream, typed)` chats with a server that streams these bytes; what it was asked is in
    `chat.asked`.
    """
    folder = tmp_path / "store/artifacts/package/k"
    folder.mkdir(parents=True)
    (folder / "prompt.txt").write_text("You are Annie.\n")
    (folder / "tools.json").write_text('[{"type": "function", "function": {"name": "set_timer"}}]')
    server = {"served_name": "boat", "assistant": "[Bob]", "chat_template_kwargs": {"enable_thinking": False}}
    (folder / "serve.json").write_text(json.dumps(server))

    def chatted(stream, typed, *options, url=None, status=200, **variables):
        chatted.asked = []

        def answer(handler):
            chatted.asked.append(json.loads(handler.asked))
            chatted.key = handler.headers["Authorization"]
            handler.reply(status, stream)

        with http_server.serving(answer) as port:
            words = [sys.executable, str(REPO / "build.py"), "chat", "--url"]
            return subprocess.run(
                [*words, url or f"http://127.0.0.1:{port}", *options],
                input=typed,
                text=True,
                capture_output=True,
                env={**os.environ, "ANNIE_HOME": str(tmp_path), **variables},
            )

    return chatted


def test_a_piped_chat_streams_shows_tool_calls_and_keeps_the_history(chat):
    stream = b"".join(map(event, DELTAS)) + event({}, "tool_calls") + DONE
    said = chat(stream, "five minutes\nthanks\n/reset\nagain\n")
    assert said.returncode == 0, said.stderr
    assert "Timer [is] set." in said.stdout and "-> set_timer(minutes=5)" in said.stdout
    assert [len(body["messages"]) for body in chat.asked] == [2, 5, 2]
    assert chat.asked[0]["messages"][0] == {"role": "system", "content": "You are Annie."}
    assert chat.asked[0]["tools"] and chat.asked[0]["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    "ending",
    [
        b'data: {"error": {"message": "EngineCore encountered an issue", "code": 500}}\n\n' + DONE,
        b"",
        DONE,
        b"data: {not json}\n\n",
        b'data: "text"\n\n',
    ],
)
def test_half_an_answer_is_not_shown_as_a_whole_one(chat, ending):
    said = chat(event({"content": "Take two"}) + ending, "", "a question")
    assert said.returncode == 1
    assert "an answer that was cut off" in said.stderr and "Traceback" not in said.stderr


def test_an_answer_that_reached_its_longest_length_says_so(chat):
    said = chat(event({"content": "Take two"}) + event({}, "length") + DONE, "", "a question")
    assert "the answer has reached its longest length" in said.stdout


def test_a_call_that_was_cut_stays_out_of_the_history(chat):
    cut = {"index": 0, "id": "c1", "function": {"name": "set_timer", "arguments": '{"min'}}
    chat(event({"tool_calls": [cut]}) + event({}, "length") + DONE, "five minutes\nthanks\n")
    assert [len(body["messages"]) for body in chat.asked] == [2, 2]


def test_control_sequences_of_an_answer_do_not_reach_the_terminal(chat):
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\u202egnp.exe\rover"
    call = {"index": 0, "id": "c", "function": {"name": "f\x1b[2J", "arguments": '{"a": "\\u001b[2J"}'}}
    said = chat(event({"content": evil, "tool_calls": [call]}) + event({}, "stop") + DONE, "", "a question")
    assert not set(said.stdout) & set("\x1b\x07\x9b\u202e\r")
    assert "\\x1b]0;title" in said.stdout


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://localhost:1"])
def test_without_a_server_it_says_how_to_start_one(chat, url):
    said = chat(b"", "", "a question", url=url)
    assert said.returncode == 1
    assert "Start it: make serve." in said.stderr and "Traceback" not in said.stderr


def test_the_assistant_has_its_name_and_the_model_the_served_one(chat):
    said = chat(event({"content": "Yes."}) + event({}, "stop") + DONE, "", "a question")
    assert said.stdout == "[Bob]  Yes.\n" and [body["model"] for body in chat.asked] == ["boat"]


def test_a_server_of_another_model_is_told_apart(chat):
    said = chat(b'{"error": {"message": "The model `boat` does not exist."}}', "", "a question", status=404)
    assert said.returncode == 1 and "It serves another model than boat." in said.stderr


def test_the_key_is_sent_and_a_proxy_is_not_asked(chat, tmp_path):
    (tmp_path / "key").write_text("k" * 32)
    stream = event({"content": "Yes."}) + event({}, "stop") + DONE
    proxy = "http://127.0.0.1:1"
    said = chat(stream, "", "a question", "--api-key-file", str(tmp_path / "key"), http_proxy=proxy)
    assert said.returncode == 0, said.stderr
    assert chat.key == f"Bearer {'k' * 32}"
