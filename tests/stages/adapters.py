"""Adapters for the tests of stage merge: made and merged by PEFT, merged by the stage, and compared."""

import json

import peft
import small
import torch

from model.families.nemotron_h import names, native
from model.weights.checkpoint import Checkpoint
from stages import job
from stages.merge import merge

PARAMS = {"proof_tokens": 60, "proof_precision": "float32", "control": False}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
UP, DOWN = "mixer.experts.up_proj", "mixer.experts.down_proj"


def trained(base, size=0.05, name="default", **settings):
    """PEFT's model of a base with LoRA that has learned something."""
    torch.manual_seed(3)
    model = peft.get_peft_model(
        native.load(base),
        peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **settings}),
        adapter_name=name,
    )
    for key, value in model.named_parameters():
        if "lora_B" in key:
            value.data = size * torch.randn_like(value)
        if "magnitude" in key:
            value.data *= 1 + 0.1 * torch.rand_like(value)
    return model


def saved(folder, model, **how):
    model.save_pretrained(folder / "adapter", **how)
    return folder


def edited(folder, **changes):
    """The folder with keys of adapter_config.json changed."""
    file = next((folder / "adapter").rglob("adapter_config.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def task(tmp_path, made, folder, **params):
    return small.job("merge", tmp_path, PARAMS | params, base=made["base"], data=made["data"], train=folder)


def merged(tmp_path, made, folder, **params):
    """Runs stage merge; its output folder."""
    its = task(tmp_path, made, folder, **params)
    merge.run(its)
    return its.output


def by_peft(base, model):
    """Hub name -> what PEFT's own merge makes of the float32 model, rounded once to the base's dtype."""
    whole = {**dict((found := model.merge_and_unload()).named_parameters()), **dict(found.named_buffers())}
    source, right = Checkpoint(base), {}
    for name, entry in source.entries.items():
        value = whole[names.native(name)].detach()
        if ".experts." in name:
            value = value[int(name.split(".experts.")[1].split(".")[0])]
        right[name] = value.to(source.tensor(name).dtype) if entry.dtype == "BF16" else value
    return right


def facts(output):
    return json.loads((output / "merge.json").read_text())


def warnings(patch):
    """A list that fills with the messages of the stage's warnings."""
    messages = []
    patch.setattr(job, "warning", lambda message, remedy="": messages.append(message))
    return messages
