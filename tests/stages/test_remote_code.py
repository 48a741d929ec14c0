"""No stage runs code of a checkpoint's folder; its tokenizer and its chat template have limits."""

import ast
import io
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import contracts
import pytest
import small

from model import audit, checkpoint_audit
from model.families import limits, tokens
from model.families.nemotron_h import native
from model.families.nemotron_h.chat import template_text
from model.weights.paths import CheckpointError
from stages.base import __main__ as base
from stages.data import prepare
from stages.job import Job, StageError

REPO = Path(__file__).resolve().parents[2]
CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast):
    pass
class EvilConfig(PretrainedConfig):
    model_type = "nemotron_h"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = small.base(tmp_path_factory.mktemp("made") / "base", "*E")
    return small.tokenizer(folder)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "base")


def edited(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def evil(folder, tmp_path, monkeypatch):
    """A folder whose code would leave a file behind, and a user who says yes to everything."""
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    names = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    edited(folder / "config.json", auto_map=names)
    edited(
        folder / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": [None, "evil.Evil"]},
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    yield folder
    assert not marker.exists(), "code of the folder ran"


def take(folder, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    params = contracts.defaults("base", source="folder")
    base.run(Job("base", params, {}, output, tmp_path, 0, {"folder": [folder]}))


def data_job(folder, tmp_path):
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    (tmp_path / "talks.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "prompt.txt").write_text("Be brief.\n")
    output = tmp_path / "data"
    output.mkdir()
    sources = {"conversations": [tmp_path / "talks.jsonl"], "prompt": [tmp_path / "prompt.txt"]}
    params = contracts.defaults("data", missing_prompt="add")
    return Job("data", params, {"base": folder}, output, tmp_path, 0, sources)


def test_stages_never_run_code_of_the_folder(evil, tmp_path):
    for run in (lambda: take(evil, tmp_path), lambda: prepare.run(data_job(evil, tmp_path))):
        with pytest.raises(StageError, match="the tokenizer of base cannot be loaded"):
            run()
    native.load(evil)
    assert audit.bf16(evil) == [] == checkpoint_audit.audit(evil).findings
    small.adapter(tmp_path / "train", evil, "attention")


def test_every_auto_class_is_told_not_to_trust():
    calls = 0
    for file in [*(REPO / "model").rglob("*.py"), *(REPO / "stages").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", file
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                calls += 1
                if "Auto" in ast.unparse(node.func):
                    assert "trust_remote_code" in [word.arg for word in node.keywords], file
    assert calls >= 4


GARBAGE = {
    "no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be loaded"),
    "another object": (lambda f: (f / "tokenizer.json").write_text('{"a": 1}'), "cannot be loaded"),
    "a list of settings": (lambda f: (f / "tokenizer_config.json").write_text("[1]"), "cannot be loaded"),
    "a class that is not there": (
        lambda f: edited(f / "tokenizer_config.json", tokenizer_class="NoSuchTokenizer"),
        "",
    ),
    "ids beyond the vocabulary": (
        lambda f: edited(f / "config.json", vocab_size=100),
        r"ids from 0 to \d+, and vocab_size in config.json is 100",
    ),
}


@pytest.mark.parametrize("fault", GARBAGE)
def test_a_tokenizer_that_is_garbage_is_refused_by_name(folder, fault):
    change, found = GARBAGE[fault]
    change(folder)
    if not found:
        tokens.load(folder)  # transformers takes its own fast class
        return
    with pytest.raises(CheckpointError, match=found) as error:
        tokens.load(folder)
    assert str(error.value).isprintable() and error.value.expected and error.value.remedy


TEMPLATES = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "ran for"),
    "a text without end": ("{{ 'a' * 50000000000 }}", "ended in MemoryError"),
    "a text that doubles": (
        "{% set n = namespace(t='aaaaaaaa') %}"
        "{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
        "ended in MemoryError",
    ),
    "more than a conversation": ("{{ 'a' * 200000000 }}", "200000000 characters"),
    "calls itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "ended in RecursionError"),
    "no template": ("{% for %}", "cannot be read"),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_ends_stage_data_with_a_sentence(folder, tmp_path, monkeypatch, kind):
    template, found = TEMPLATES[kind]
    monkeypatch.setattr(limits, "SECONDS", 1.0 if kind == "loops" else 60.0)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(StageError, match=f"the chat template.*{found}|{found}") as error:
        prepare.run(data_job(folder, tmp_path))
    assert error.value.remedy


def test_no_template_is_rendered_where_it_has_no_limits(folder):
    tokenizer = tokens.load(folder)
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="in the main thread alone"):
        pool.submit(template_text, tokenizer, [{"role": "user", "content": "Hi"}]).result()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ 1 + 'a' }}",
        "{{ 1 / 0 }}",
        "{% if 1e400 > messages | length %}{% endif %}",
        "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_gives_the_reason(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="the chat template fails"):
        template_text(tokens.load(folder), [{"role": "user", "content": "Hi"}])
