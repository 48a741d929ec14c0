"""The readers of strangers' bytes, each with whole files to change. What is imported here, and no pytest, is
all that `python -m tests.stages.fuzz` needs; a reader whose library is not there is left out.
"""

import gzip
import importlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import small
import torch
from packed import quantised
from safetensors.torch import save_file

from model import audit, checkpoint_audit
from model.families import limits, registry, tokens
from model.families.messages import ChatError
from model.families.nemotron_h import chat
from model.families.nemotron_h.targets import targets
from model.lora import Adapter, AdapterError
from model.weights import lora_config, quant_config
from model.weights.checkpoint import INDEX, Checkpoint
from model.weights.header import header
from model.weights.paths import CheckpointError, read_json
from stages.base import hub
from stages.conversations import content, files, rows, sent
from stages.evaluate import questions
from stages.job import Job, StageError


@dataclass(frozen=True)
class Reader:
    """`read` reads the files `names` of `folder`: it succeeds, or raises one of `allowed`."""

    read: Callable[[], Any]
    folder: Path
    names: list[str]
    allowed: tuple[type[Exception], ...]


def base(folder):
    """A whole BF16 checkpoint without a tokenizer."""
    return small.base(folder / "base", "*E")


def refuse_findings(findings):
    for finding in findings:
        assert all(text and text.isprintable() for text in finding.as_json().values()), finding
    if findings:
        raise CheckpointError(str(findings[0]))


def of_header(folder, stack):
    file = folder / "a.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4).bfloat16()}, file, metadata={"format": "pt"})

    def read():
        for entry in header(file)[0].values():
            assert 0 <= entry.start <= entry.end <= file.stat().st_size

    return Reader(read, folder, [file.name], (CheckpointError,))


def of_checkpoint(folder, stack):
    folder = base(folder)
    settings = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    settings["kv_cache_quant_algo"] = None
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": settings}))

    def read():
        checkpoint = Checkpoint(folder)
        quant_config.read(folder, checkpoint.config)
        for name in list(checkpoint.entries)[:3]:
            checkpoint.tensor(name)

    names = [INDEX, *Checkpoint(folder).files, "config.json", "hf_quant_config.json"]
    return Reader(read, folder, names, (CheckpointError,))


def of_audit(folder, stack):
    """An audit answers with findings, so nothing at all may be raised."""
    folder = base(folder)
    names = [INDEX, *Checkpoint(folder).files, "config.json"]
    return Reader(lambda: refuse_findings(audit.bf16(folder)), folder, names, (CheckpointError,))


def of_checkpoint_audit(folder, stack):
    source = base(folder)
    folder = quantised(source, folder / "packed", "nvidia")
    names = [INDEX, *Checkpoint(folder).files, "config.json", "hf_quant_config.json"]

    def read():
        refuse_findings(checkpoint_audit.audit(folder, source, "0.32.0").findings)

    return Reader(read, folder, names, (CheckpointError,))


def of_packed_audit(folder, stack):
    """Packed weights are compared with their source, all of them; both are changed."""
    source = base(folder)
    made = quantised(source, folder / "packed", "nvidia")
    record = {"scales": "nearest", "calibration": {"input_scales": "0" * 64}}
    (made / "audit.json").write_text(json.dumps(record))
    names = [f"{place.name}/{file}" for place in (made, source) for file in Checkpoint(place).files]

    def read():
        findings = checkpoint_audit.audit(made, source, deep=True).findings
        # no input scales have the digest above
        refuse_findings([finding for finding in findings if finding.subject != "input_scale"])

    return Reader(read, folder, [*names, f"packed/{INDEX}", "packed/audit.json"], (CheckpointError,))


def adapter(folder, checkpoint):
    """A LoRA of rank 4 on the attention, as PEFT writes it."""
    folder.mkdir()
    family, config = registry.of(checkpoint.config), checkpoint.config
    chosen = targets(config, "attention").arguments()
    tensors = {}
    for linear in family.targeted(config, "attention"):
        name = f"base_model.model.{linear.module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, linear.inside)
        tensors[f"{name}.lora_B.weight"] = torch.randn(linear.out, 4)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
    settings |= {"lora_dropout": 0.0, "inference_mode": True, "use_rslora": False, "use_dora": False}
    (folder / lora_config.CONFIG).write_text(json.dumps({**settings, **chosen}, indent=1, sort_keys=True))
    return folder


def of_adapter(folder, stack):
    with suppress(ModuleNotFoundError):  # lora_config compares with PEFT's defaults if PEFT is there
        importlib.import_module("peft")
    checkpoint = Checkpoint(base(folder))
    folder = adapter(folder / "adapter", checkpoint)

    def read():
        lora_config.read(folder)
        found = Adapter(folder, checkpoint)
        found.change(next(iter(found.pairs)))

    names = [lora_config.CONFIG, "adapter_model.safetensors"]
    return Reader(read, folder, names, (AdapterError, CheckpointError))


def of_peft_reading(folder, stack):
    importlib.import_module("peft")
    from stages.merge.peft_reading import PeftReading

    checkpoint = Checkpoint(base(folder))
    folder = adapter(folder / "adapter", checkpoint)

    def read():
        found = Adapter(folder, checkpoint)  # as stage merge does
        PeftReading(folder, found.tensors, checkpoint.config)

    names = [lora_config.CONFIG, "adapter_model.safetensors"]
    return Reader(read, folder, names, (AdapterError, CheckpointError, StageError))


def of_json(folder, stack):
    (folder / "a.json").write_text(json.dumps({"a": [1, 2.5, {"b": "text"}], "c": None}))
    return Reader(lambda: read_json(folder / "a.json"), folder, ["a.json"], (CheckpointError,))


def of_tokenizer(folder, stack):
    folder = small.tokenizer(base(folder))
    names = ["tokenizer.json", "tokenizer_config.json", "config.json"]
    return Reader(lambda: tokens.load(folder), folder, names, (CheckpointError,))


CALL = {"id": "1", "type": "function", "function": {"name": "set", "arguments": '{"min": 5}'}}
ROW = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Set a timer, 5 min."},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "ok", "tool_call_id": "1"},
        {"role": "assistant", "content": "Done."},
    ]
}
PROPERTIES = {"type": "object", "properties": {"min": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "set", "parameters": PROPERTIES}}]
CHAT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello.", "weight": 1}]
OTHERS = [{"conversations": CHAT, "category": "c"}, {"instruction": "Say hi.", "input": "", "output": "Hi."}]
LINES = "".join(json.dumps(row) + "\n" for row in [ROW, ROW, *OTHERS]).encode()
LESSONS = f"{json.dumps(ROW)}\n".encode() * 2


def of_template(folder, stack):
    folder = small.tokenizer(base(folder))
    tokenizer = tokens.load(folder)
    seconds, limits.SECONDS = limits.SECONDS, 0.5
    stack.callback(setattr, limits, "SECONDS", seconds)

    def read():
        tokenizer.chat_template = (folder / "chat_template.jinja").read_text(errors="replace")
        try:
            chat.template_text(tokenizer, ROW["messages"], TOOLS)
        except ChatError as error:  # as stage data makes a reject of it
            raise StageError(str(error), "a row", "") from error

    return Reader(read, folder, ["chat_template.jinja"], (CheckpointError, StageError))


def parquet():
    pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist([ROW] * 3), buffer)
    return buffer.getvalue().to_pybytes()


def excel():
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        opened.writestr("xl/workbook.xml", "<workbook/>")
    return buffer.getvalue()


def of_conversations(make_bytes):
    def prepare(folder, stack):
        (folder / "a.jsonl").write_bytes(make_bytes())

        def read():
            gathered = rows.gather(files.list_files([folder / "a.jsonl"]))
            if gathered.rejects:
                raise StageError(gathered.rejects[0].reason, "a row", "")

        return Reader(read, folder, ["a.jsonl"], (StageError, content.Foreign))

    return prepare


def of_prompt_and_tools(folder, stack):
    (folder / "prompt.txt").write_text("Be brief.\n")
    (folder / "tools.json").write_text(json.dumps(TOOLS))

    def read():
        sent.read_prompt(folder / "prompt.txt")
        sent.read_tools(folder / "tools.json")

    return Reader(read, folder, ["prompt.txt", "tools.json"], (StageError,))


def of_questions(folder, stack):
    expected = {"tool": {"name": "set", "arguments": {"min": 5}}}
    asked = {"id": "a", "category": "c", "messages": ROW["messages"][:2], "tools": TOOLS, "expect": expected}
    other = {**asked, "id": "b", "expect": {"no_tool": True, "max_words": 5, "must_say": ["Hi"]}}
    (folder / "questions.jsonl").write_text(f"{json.dumps(asked)}\n{json.dumps(other)}\n")

    def read():
        found, findings = questions.read(folder / "questions.jsonl")
        findings += [*questions.prompt_findings(found, "Be brief."), *questions.tool_findings(found, TOOLS)]
        if findings:
            raise StageError(findings[0].found, findings[0].expected, findings[0].remedy)

    return Reader(read, folder, ["questions.jsonl"], (StageError,))


def of_lessons(folder, stack):
    (folder / "lessons.jsonl").write_bytes(LESSONS)
    (folder / "made").mkdir()
    from stages.base import make

    def read():
        lessons = make.read_lessons([folder / "lessons.jsonl"])
        make.render_lessons(lessons, make.make_tokenizer(lessons, 600, folder / "made"))

    return Reader(read, folder, ["lessons.jsonl"], (StageError, CheckpointError))


def of_hub(folder, stack):
    """The list of files as a real server sends it and huggingface_hub takes it."""
    import loopback_hub
    from huggingface_hub import constants

    published = folder / "published"
    published.mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (published / name).write_text(name)
    server = loopback_hub.Hub(published)
    (folder / "list.json").write_text(json.dumps(server.info(), indent=1))
    stack.enter_context(server)
    for name, value in (("ENDPOINT", server.url), ("HF_HUB_OFFLINE", False)):
        stack.callback(setattr, constants, name, getattr(constants, name))
        setattr(constants, name, value)
    task = Job("base", {}, {}, folder / "output", folder / "scratch", 0)

    def read():
        server.page = (folder / "list.json").read_bytes() or b"\n"
        hub.check_names(hub.listing(loopback_hub.REPOSITORY, loopback_hub.COMMIT, False, ("*",)), task)

    return Reader(read, folder, ["list.json"], (StageError, CheckpointError))


READERS = {
    "header": of_header,
    "checkpoint": of_checkpoint,
    "audit": of_audit,
    "checkpoint_audit": of_checkpoint_audit,
    "packed_audit": of_packed_audit,
    "adapter": of_adapter,
    "peft_reading": of_peft_reading,
    "json": of_json,
    "tokenizer": of_tokenizer,
    "template": of_template,
    "lines": of_conversations(lambda: LINES),
    "array": of_conversations(lambda: json.dumps([ROW, ROW], indent=1).encode()),
    "utf-16": of_conversations(lambda: LINES.decode().encode("utf-16")),
    "gzip": of_conversations(lambda: gzip.compress(LINES)),
    "parquet": of_conversations(parquet),
    "excel": of_conversations(excel),
    "prompt_and_tools": of_prompt_and_tools,
    "questions": of_questions,
    "lessons": of_lessons,
    "hub": of_hub,
}
