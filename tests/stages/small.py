"""A small checkpoint, adapter and data set for the tests of stages."""

import json

import torch

from model.families.nemotron_h import native, targets
from model.weights.checkpoint import Checkpoint
from stages.base import tiny
from stages.job import Job

PATTERN = "MEM*E"


def base(folder, pattern=PATTERN):
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    description = tiny.config(pattern, 128, 4, 512)
    model = native.build(description)
    tiny.delicate_biases(model, 0)
    for name, value in model.named_parameters():
        if name.endswith(("A_log", ".D")):
            value.data += 0.01 * torch.rand_like(value)  # values that BF16 cannot hold
    tiny.save(model, description, folder)
    return folder


def adapter(folder, checkpoint, preset="all", size=0.05):
    import peft

    model = native.load(checkpoint)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=0.0,
            **targets.targets(Checkpoint(checkpoint).config, preset).arguments(),
        ),
    )
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data = size * torch.randn_like(value)
    model.save_pretrained(folder / "adapter")
    return folder


def data(folder):
    torch.manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"input_ids": ids, "labels": [-100] * 50 + ids[50:]}
        for ids in torch.randint(20, 500, (4, 150)).tolist()
    ]
    for name, part in (("train", rows), ("eval", rows[:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def tokenizer(folder):
    from stages.base import tokenizer

    tokenizer.write(tokenizer.train(["words and again words"], 300), folder)
    return folder


def job(stage, tmp_path, params, **inputs):
    output = tmp_path / f"{stage}-output"
    output.mkdir()
    return Job(stage, params, inputs, output, tmp_path, 0)
