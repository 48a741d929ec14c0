"""Readers of strangers' bytes give a result or their own error within a second, whatever the bytes are.

ANNIE_FUZZ_SECONDS=3600 tries each for an hour; ANNIE_FUZZ_SEED=N begins with the case of a failure.
"""

import gzip
import json
import shutil

import fuzz
import pytest
import small
import torch
from packed import quantised
from safetensors.torch import save_file

from model import audit, checkpoint_audit
from model.lora import Adapter, AdapterError
from model.weights import lora_config, quant_config
from model.weights.checkpoint import INDEX, Checkpoint
from model.weights.header import header
from model.weights.paths import CheckpointError, read_json
from stages.data import content, files, production, rows
from stages.job import StageError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = small.base(tmp_path_factory.mktemp("made") / "base", "*E")
    small.tokenizer(folder)
    settings = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}}
    settings["quantization"]["kv_cache_quant_algo"] = None
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {}, **settings}))
    return folder


def test_header(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4).bfloat16()}, file, metadata={"format": "pt"})

    def read():
        for entry in header(file)[0].values():
            assert 0 <= entry.start <= entry.end <= file.stat().st_size

    fuzz.check(read, tmp_path, [file.name], CheckpointError)


def test_checkpoint(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")

    def read():
        checkpoint = Checkpoint(folder)
        quant_config.read(folder, checkpoint.config)
        for name in list(checkpoint.entries)[:3]:
            checkpoint.tensor(name)

    names = [INDEX, *Checkpoint(folder).files, "config.json", "hf_quant_config.json"]
    fuzz.check(read, folder, names, CheckpointError)


@pytest.mark.parametrize("reads", [audit.bf16, checkpoint_audit.audit])
def test_audits_find_and_never_fail(base, tmp_path, reads):
    """An audit answers with findings, so nothing at all may be raised."""
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "hf_quant_config.json").unlink()

    def read():
        result = reads(folder)
        findings = result if isinstance(result, list) else result.findings
        for finding in findings:
            assert all(text and text.isprintable() for text in finding.as_json().values()), finding
        if findings:
            raise CheckpointError(str(findings[0]))

    fuzz.check(read, folder, [INDEX, *Checkpoint(folder).files, "config.json"], CheckpointError)


def test_an_audit_of_packed_weights_beside_their_source_finds_and_never_fails(base, tmp_path):
    made, source = quantised(base, tmp_path / "made", "nvidia"), shutil.copytree(base, tmp_path / "base")
    record = {"scales": "nearest", "calibration": {"engine": "own", "input_scales": "0" * 64}}
    (made / "audit.json").write_text(json.dumps(record))

    def read():
        findings = checkpoint_audit.audit(made, source, deep=True).findings
        for finding in findings:
            assert all(text and text.isprintable() for text in finding.as_json().values()), finding
        for finding in findings:
            if finding.subject != "input_scale":  # nothing has the digest above
                raise CheckpointError(str(finding))

    names = [f"{folder.name}/{file}" for folder in (made, source) for file in Checkpoint(folder).files]
    fuzz.check(read, tmp_path, [*names, f"made/{INDEX}", "made/audit.json"], CheckpointError)


def test_adapter(base, tmp_path):
    checkpoint = Checkpoint(base)
    folder = small.adapter(tmp_path, base, "attention") / "adapter"

    def read():
        lora_config.read(folder)
        adapter = Adapter(folder, checkpoint)
        adapter.change(next(iter(adapter.pairs)))

    fuzz.check(
        read, folder, [lora_config.CONFIG, "adapter_model.safetensors"], (AdapterError, CheckpointError)
    )


def test_json(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": [1, 2.5, {"b": "text"}], "c": None}))
    fuzz.check(lambda: read_json(tmp_path / "a.json"), tmp_path, ["a.json"], CheckpointError)


ROW = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Set a timer, 5 min."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "set", "arguments": '{"min": 5}'}}
            ],
        },
        {"role": "tool", "content": "ok", "tool_call_id": "1"},
        {"role": "assistant", "content": "Done."},
    ]
}
LINES = "".join(json.dumps(row) + "\n" for row in [ROW, {**ROW, "weight": 1}]).encode()


def parquet():
    import io

    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW] * 3), buffer)
    return buffer.getvalue()


TALKS = {
    "lines": lambda: LINES,
    "array": lambda: json.dumps([ROW, ROW], indent=1).encode(),
    "utf-16": lambda: LINES.decode().encode("utf-16"),
    "gzip": lambda: gzip.compress(LINES),
    "parquet": parquet,
}


@pytest.mark.parametrize("kind", TALKS)
def test_conversations(tmp_path, kind):
    (tmp_path / "a.jsonl").write_bytes(TALKS[kind]())

    def read():
        gathered = rows.gather(files.list_files([tmp_path / "a.jsonl"]))
        if gathered.rejects:
            raise StageError(gathered.rejects[0].reason, "a row", "")

    fuzz.check(read, tmp_path, ["a.jsonl"], (StageError, content.Foreign))


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "set",
            "parameters": {"type": "object", "properties": {"min": {"type": "integer"}}},
        },
    }
]


def test_prompt_and_tools(tmp_path):
    (tmp_path / "prompt.txt").write_text("Be brief.\n")
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))

    def read():
        production.read_prompt(tmp_path / "prompt.txt")
        production.read_tools(tmp_path / "tools.json")

    fuzz.check(read, tmp_path, ["prompt.txt", "tools.json"], StageError)
