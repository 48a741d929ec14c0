"""A small checkpoint, its exports as stage quantize writes them, and the models that those stand for."""

import json
import shutil

import contracts
import pytest
import small
import torch
from safetensors.torch import load_file, save_file

from model import audit, checkpoint_audit, layouts
from model.families import serve
from model.families.nemotron_h import names, native
from model.weights import nvfp4, quant_config
from model.weights.checkpoint import INDEX, SINGLE, Checkpoint
from stages.base import tokenizer
from stages.job import Job
from stages.quantize import quantize

# ChatML with the switch of the model's own template, which is TRL's to ship and so not in this environment.
TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant
{{ '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\n' }}"""  # noqa: E501
AMAX = 8.0  # of activations; in the line it is measured


def base(folder):
    """A BF16 checkpoint with a tokenizer, whose Mamba layers carry a state."""
    small.base(folder)
    remember(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", lambda: TEMPLATE)
        tokenizer.write(tokenizer.train(["hello world how are you today"], 512), folder)
    return folder


def remember(folder):
    """Makes the Mamba layers carry a state, by small steps (dt is about 0.0003): untrained ones hardly use
    theirs.
    """
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith(("in_proj.weight", "conv1d.weight")):
                tensor *= 10
            elif name.endswith(".D"):
                tensor *= 0.1
            elif name.endswith("dt_bias"):
                tensor.fill_(-8)
        save_file(tensors, file, metadata={"format": "pt"})


def export(source, folder, chosen, form):
    """`source` in NVFP4, written and declared by the stage's own writers; every audit passes it."""
    folder.mkdir()
    checkpoint, weight_only = Checkpoint(source), form == "w4a16"
    modules = layouts.quantised(checkpoint.config, chosen)
    maxima = {} if weight_only else dict.fromkeys(modules, torch.tensor(AMAX))
    quantize.stream(
        checkpoint,
        modules,
        maxima,
        Job("quantize", contracts.defaults("quantize", layout=chosen), {}, folder, folder.parent, 0),
    )
    quant_config.write(folder, layouts.hf_quant_config(checkpoint.config, chosen, "FP8", "0", weight_only))
    (folder / "audit.json").write_text(json.dumps({"layout": chosen}))
    assert audit.nvfp4(folder, chosen, source, weight_only) == []
    assert checkpoint_audit.audit(folder, source, serve.installed()).findings == []
    return folder


def weights(folder, read=nvfp4.unpack):
    """Hub name -> what the codes of a quantised linear stand for, float32 (out, in)."""
    checkpoint = Checkpoint(folder)
    for name in sorted(audit.packed_modules(checkpoint)):
        yield (
            f"{name}.weight",
            read(
                nvfp4.Packed(
                    *(checkpoint.tensor(f"{name}.{part}") for part in ("weight", *layouts.PARTS[:2]))
                )
            ),
        )


def decoded(source, folder, read=nvfp4.unpack):
    """The model that an export of `source` stands for, with its weights in float32."""
    model = native.load(source)
    for name, weight in weights(folder, read):
        parameter = model.get_parameter(names.native(name)).data
        (
            parameter[int(name.split(".experts.")[1].split(".")[0])] if ".experts." in name else parameter
        ).copy_(weight)
    return model


def in_bf16(source, folder, copy):
    """The same as a checkpoint: `source` with the weights that the codes stand for, in BF16."""
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    checkpoint = Checkpoint(source)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.entries} | {
        name: weight.bfloat16() for name, weight in weights(folder)
    }
    save_file(tensors, copy / SINGLE, metadata={"format": "pt"})
    assert audit.bf16(copy) == []
    return copy
