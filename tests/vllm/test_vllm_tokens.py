"""Stage data and a real vLLM make the same tokens of a hundred conversations.

Stage data runs in the train environment, whose python tests/run.py names in ANNIE_TEST_TRAIN_PYTHON: only
there is TRL, which ships the model's chat template. One server is started, on random weights.
"""

import json
import os
import subprocess
import tomllib
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import conversations
import pytest
import small
from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion import protocol
from vllm.tool_parsers import ToolParserManager

from model.families import serve
from model.families.nemotron_h.serving import NEMOTRON_H, SERVED_NAME, THINKING_OFF
from model.families.serve import Served
from stages.evaluate import evaluate
from stages.evaluate.server import Server

PYTHON = os.environ.get("ANNIE_TEST_TRAIN_PYTHON")
if not PYTHON:
    pytest.skip("needs ANNIE_TEST_TRAIN_PYTHON, which tests/run.py sets", allow_module_level=True)
REPO = Path(__file__).resolve().parents[2]
CASES = conversations.hundred()
TOKENIZER = """
import sys
from pathlib import Path
from stages.base import tokenizer
tokenizer.write(tokenizer.train(Path(sys.argv[2]).read_text().split("\\n"), 512), Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Random weights with the model's own chat template, and a tokenizer with its control tokens."""
    folder = small.base(tmp_path_factory.mktemp("tokens") / "base")
    words = folder.parent / "words.txt"
    words.write_text("\n".join(json.dumps(row, ensure_ascii=False) for _, row, _ in CASES))
    train_python("-c", TOKENIZER, folder, words)
    return folder


@pytest.fixture(scope="module")
def rows(base):
    """What stage data makes of every case, in their order."""
    folder = base.parent
    for name in ("output", "scratch"):
        (folder / name).mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _, row, _ in CASES))
    (folder / "prompt.txt").write_text("You are Annie.")
    contract = tomllib.loads((REPO / "stages" / "data" / "stage.toml").read_text())
    params = {name: parameter["default"] for name, parameter in contract["parameters"].items()}
    params |= {
        "max_tokens": 100_000,
        "eval_share": 0.0,
        "other_prompts": "allow",
        "missing_prompt": "insert",
        "max_reject_share": 1.0,
    }
    (folder / "job.json").write_text(
        json.dumps(
            {
                "stage": "data",
                "params": params,
                "inputs": {"base": str(base)},
                "secrets": {},
                "output": str(folder / "output"),
                "scratch": str(folder / "scratch"),
                "seed": 0,
                "sources": {
                    "conversations": [str(folder / "rows.jsonl")],
                    "prompt": [str(folder / "prompt.txt")],
                },
            }
        )
    )
    train_python("-m", "stages.data", folder / "job.json")
    assert not (folder / "output" / "rejects.jsonl").read_text()
    made = [json.loads(line) for line in (folder / "output" / "train.jsonl").read_text().split("\n") if line]
    assert [row["line"] for row in made] == list(range(1, len(CASES) + 1))
    return made


@pytest.fixture(scope="module")
def server(base):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS"):
            patch.setenv(name, "1")
        with Server(base, NEMOTRON_H.serve(serve.installed(), "cpu", Served(), 4096, 4), "tokens") as started:
            yield started


def train_python(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(
        [PYTHON, *map(str, arguments)], cwd=REPO, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]


def request(messages, tools, generation):
    body = {
        "model": SERVED_NAME,
        "messages": messages,
        "add_generation_prompt": generation,
        "chat_template_kwargs": THINKING_OFF,
    }
    return body | ({"tools": tools} if tools else {})


def tokenize(server, messages, tools, generation):
    """The server's tokens for a request."""
    sent = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/tokenize",
        json.dumps(request(messages, tools, generation)).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(sent, timeout=60) as answer:
        return json.load(answer)["tokens"]


def spans(labels):
    """Runs of trained tokens: (first, after the last)."""
    edges = [
        n
        for n in range(len(labels) + 1)
        if (n < len(labels) and labels[n] != -100) != (n > 0 and labels[n - 1] != -100)
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


def compare(server, case, row):
    """Where a row of stage data differs from the server's tokens: the whole, or the prompt of a turn."""
    name, sent, as_sent = case
    messages = [evaluate.as_openai(message) for message in row["messages"]]
    wrong = []
    if tokenize(server, messages, row["tools"], False) != row["input_ids"]:
        wrong.append(f"{name}: the conversation")
    if as_sent and tokenize(server, sent["messages"], sent.get("tools"), False) != row["input_ids"]:
        wrong.append(f"{name}: the conversation as it was sent")
    trained = [
        n
        for n, message in enumerate(row["messages"])
        if message["role"] == "assistant" and message.get("train", True)
    ]
    for number, (first, _) in zip(trained, spans(row["labels"]), strict=True):
        if tokenize(server, messages[:number], row["tools"], True) != row["input_ids"][:first]:
            wrong.append(f"{name}: the prompt of message {number + 1}")
    return wrong


@pytest.mark.trap("trained-text-is-not-the-served-text")
def test_a_hundred_conversations_have_the_tokens_that_vllm_makes_of_them(rows, server):
    assert len(rows) == len(CASES) == 100
    with ThreadPoolExecutor(4) as pool:
        wrong = [
            fault
            for faults in pool.map(lambda pair: compare(server, *pair), zip(CASES, rows, strict=True))
            for fault in faults
        ]
    assert not wrong


@pytest.mark.trap("trained-text-is-not-the-served-text")
def test_a_chat_completion_has_the_tokens_of_the_tokenize_request(rows, server):
    """The tools pass through vLLM's parser there, which may change a request."""
    for row in rows[::7]:  # the 78th has thoughts in its history
        last = max(
            n
            for n, message in enumerate(row["messages"])
            if message["role"] == "assistant" and message.get("train", True)
        )
        messages = [evaluate.as_openai(message) for message in row["messages"][:last]]
        answer = server.ask(
            request(messages, row["tools"], True) | {"max_tokens": 1, "return_token_ids": True}
        )
        assert answer["prompt_token_ids"] == row["input_ids"][: spans(row["labels"])[-1][0]]


@pytest.mark.trap("call-written-as-text")
def test_the_server_s_parser_reads_every_trained_call_back(base, rows):
    """The trained text of a turn that calls tools gives the row's own calls, with every value as it was."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    read = 0
    for row in rows:
        asked = protocol.ChatCompletionRequest(
            **request([{"role": "user", "content": "x"}], row["tools"], True)
        )
        parser = ToolParserManager.get_tool_parser("qwen3_coder")(tokenizer, asked.tools)
        trained = [m for m in row["messages"] if m["role"] == "assistant" and m.get("train", True)]
        for message, (first, last) in zip(trained, spans(row["labels"]), strict=True):
            if calls := message.get("tool_calls"):
                text = tokenizer.decode(row["input_ids"][first : last - 1])  # vLLM leaves <|im_end|> out
                answer = parser.extract_tool_calls(text, asked)
                functions = [call.function for call in answer.tool_calls]
                assert [(f.name, json.loads(f.arguments)) for f in functions] == [
                    (call["function"]["name"], call["function"]["arguments"]) for call in calls
                ]
                assert (answer.content or "").strip() == message["content"]
                read += len(calls)
    assert read >= 50
