"""Every command of the README is run: here, on what the demo has built, or by .ci/run. So is every command of
the docs on own data and on versions.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from conftest import BUILD, REPO, free_port, ran, serving

# Commands that are long or need an engine, and the line of .ci/run that runs them.
IN_CI = {
    "make test": "make test",
    "make model": "make model RECIPE=tiny",
    "make model RECIPE=tiny": "make model RECIPE=tiny",
    "docker compose up -d vllm-nemotron-annie": "docker compose up -d vllm-nemotron-annie",
    "docker compose down": "docker compose down",
}
IN_TESTS = {  # what a command prints here, the demo having been made
    "python build.py plan": "everything is built",
    "python build.py run --until merge": "nothing to do",
    "python build.py explain train": "train: cached",
    "python build.py status": "cached",
    "python build.py logs train": "loss",
    "python build.py report": "95 % interval",
    "python build.py runs": "base to package: never built",
    "python build.py data": "tokens are trained",
    "python build.py path quantize": "/quantize/",
    "python build.py verify": "whole",
    "python build.py ls": "artifact",
    "python build.py gc": "to be removed",
}
ELSEWHERE = {
    "python build.py init mine": "test_a_folder_of_ones_own",
    "python build.py plan mine": "test_a_folder_of_ones_own",
    "python build.py data mine": "test_a_folder_of_ones_own",
    "python build.py data mine --rows 3": "test_a_folder_of_ones_own",
    "python build.py data mine --row conversations/yard.jsonl:12": "test_a_folder_of_ones_own",
    "python build.py diff": "tests/product/test_difference.py",
    "python build.py run": "tests/line/test_demo.py",
    'python build.py audit "$(python build.py path quantize)" --vllm 0.31.0': "test_audit",
    'python build.py ask "Who are you?"': "test_ask",
    "make demo": "tests/line/test_demo.py",
    "make doctor": "test_doctor",
    "make warm": "test_warm",
    "make chat": "test_serve_and_chat",
    "make serve RECIPE=tiny": "test_serve_and_chat",
}


# What takes minutes of training, and the test of make long that runs it.
IN_LONG = {
    "python build.py run mine": "tests/line/test_evening.py",
    "python build.py serve --run RUN": "tests/line/test_evening.py",
    "python build.py path quantize --run RUN": "tests/line/test_evening.py",
}


def commands(*pages: str) -> list[str]:
    texts = [(REPO / page).read_text() for page in pages or ("README.md",)]
    blocks = [block for text in texts for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL)]
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_the_demo_and_the_tests_come_first():
    assert commands()[:2] == ["make demo", "make test"]


def test_every_command_is_run_somewhere():
    script = (REPO / ".ci/run").read_text()
    for command in commands():
        assert (
            command in IN_TESTS or command in ELSEWHERE or IN_CI.get(command, "not run anywhere") in script
        ), command


@pytest.mark.parametrize("page", ["docs/own-data.md", "docs/versions.md"])
def test_every_command_of_a_page_is_run_somewhere(page):
    for command in commands(page):
        assert command in {**IN_TESTS, **ELSEWHERE, **IN_LONG}, command
    assert (REPO / "tests/line/test_evening.py").exists() and "test_evening.py" in (
        REPO / "Makefile"
    ).read_text()


def test_a_folder_of_ones_own(tmp_path):
    assert "plan" in ran(*BUILD, "init", "mine", folder=tmp_path)
    text = ran(*BUILD, "plan", "mine", "--executor", "local", folder=tmp_path)
    assert "7 of 7 to run" in text and "warning" not in text.lower()
    words = ("--rows", "3", "--row", "conversations/yard.jsonl:12")
    text = ran(*BUILD, "data", "mine", *words, "--executor", "local", folder=tmp_path)
    assert "held out             6" in text and "conversations/yard.jsonl:12, " in text
    assert text.count("characters as above") == 3 and "get_tide>\n<parameter=harbour>\nKiel" in text


@pytest.mark.parametrize(("command", "said"), IN_TESTS.items())
def test_a_command_does_what_the_readme_says(command, said):
    assert command in commands()
    assert said in ran(*BUILD, *command.split()[2:], "--executor", "local")


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="a GPU is here, and warming it takes minutes")
def test_warm():
    text = ran("make", "warm", code=2)
    assert "gpu: found no GPU that nvidia-smi can see" in text and "Traceback" not in text


def test_doctor():
    text = ran("make", "doctor", code=0 if os.path.exists("/dev/nvidia0") else 2)
    assert "gpu: found no GPU" in text or os.path.exists("/dev/nvidia0")


def test_audit():
    path = [ran(*BUILD, "path", stage, "--executor", "local").strip() for stage in ("quantize", "merge")]
    text = ran(*BUILD, "audit", path[0], "--vllm", "0.31.0", "--base", path[1], "--executor", "local")
    assert "no faults" in text and "nvidia" in text and "--moe-backend flashinfer_cutlass" in text
    assert "layout: conservative" in ran(
        *BUILD, "audit", path[0], "--vllm", "0.12.0", "--executor", "local", code=1
    )


def test_ask():
    text = ran(*BUILD, "ask", "What is the capital of France?", "--executor", "local")
    answers = dict(re.findall(r"^ +(user|base|tuned|nvfp4)  (.*)$", text, re.MULTILINE))
    assert list(answers) == ["user", "base", "tuned", "nvfp4"]
    assert answers["base"].strip() != answers["tuned"].strip() == answers["nvfp4"].strip()


def test_serve_and_chat():
    port = f"PORT={free_port()}"
    with serving("make", "serve", "RECIPE=tiny", "EXECUTOR=local", port, said="serving"):
        chat = subprocess.run(
            ["make", "chat", port],
            cwd=REPO,
            input="What is the capital of France?\n/exit\n",
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert chat.returncode == 0 and re.search(r"Annie  \S", chat.stdout), chat.stdout + chat.stderr
