"""Short runs of stage train on the small checkpoint, and ways to set a trap in them."""

import json

import contracts
import pytest
import small
import torch
from safetensors.torch import load_file

from model import adapter
from model.labels import IGNORED
from stages import job
from stages.train import fit
from stages.train.loop import History, Loop
from stages.train.ranks import Ranks

# tokens a turn: rows of 28 to 144 tokens, the longest in three chunks of the scan
LENGTHS = (4, 7, 9, 12, 14, 18, 23, 33)
SHORT = {
    "targets": "all",
    "rank": 4,
    "alpha": 8,
    "learning_rate": 5e-3,
    "steps": 4,
    "batch": 8,
    "sequence_tokens": 1024,
    "warmup_steps": 1,
    "eval_every": 2,
    "save_every": 2,
    "min_loss_drop": 0.0,
}


def inputs(folder):
    """The inputs of stage train: a base and a data set."""
    return {"base": small.tokenizer(small.base(folder / "base")), "data": chats(folder / "data")}


def turn(length, trained):
    """Ids and labels of one turn: the marker and the newline are the template's, the rest is trained in an
    answer.
    """
    ids = [10, *torch.randint(32, 280, (length,)).tolist(), 11, 32]
    return ids, [IGNORED, *ids[1:-1], IGNORED] if trained else [IGNORED] * len(ids)


def chats(folder):
    """A data set as stage data leaves it: eight conversations of different lengths, each of two questions
    and two answers.
    """
    torch.manual_seed(2)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for length in LENGTHS:
        turns = [turn(length, trained) for trained in (False, True, False, True)]
        rows.append(
            {
                "input_ids": [i for ids, _ in turns for i in ids],
                "labels": [i for _, labels in turns for i in labels],
            }
        )
    for name, part in (("train", rows), ("eval", rows[2:4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def task(folder, made, **changes):
    """A job of stage train in a new folder, a few steps long: the contract's defaults, SHORT, and what the
    test changes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return small.job("train", folder, contracts.defaults("train", **{**SHORT, **changes}), **made)


def losses(output, key="train"):
    """Step -> loss, from loss.jsonl."""
    rows = [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def rates(output):
    """The learning rate of every step."""
    return list(losses(output, "learning_rate").values())


def state(model):
    """Name -> a copy of each tensor of the adapter."""
    return {name: value.clone() for name, value in adapter.state(model).items()}


def weights(output):
    """Name -> tensor of the adapter."""
    return load_file(output / "adapter" / "adapter_model.safetensors")


def history(task):
    """What was measured, as it stands in the last checkpoint."""
    return History.from_json(
        json.loads((task.scratch / f"checkpoint-{task.params['steps']}" / "history.json").read_text())
    )


def run(folder, made, **changes):
    """A whole run; its output folder."""
    its = task(folder, made, **changes)
    fit.run(its)
    return its.output


def watched(folder, made, **changes):
    """A whole run: its job, the adapter before it and the model after it."""
    its, kept = task(folder, made, **changes), {}

    def keep(model):
        kept["model"] = model
        kept["start"] = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    with pytest.MonkeyPatch.context() as patch:
        change_model(patch, keep)
        fit.run(its)
    return {"task": its, **kept}


def loop(folder, made, **changes):
    """The Loop of a run that has not begun, and its rows."""
    its, rows = task(folder, made, **changes), fit.read_rows(made["data"] / "train.jsonl")
    return Loop(its, fit.load_model(its, Ranks()), rows, rows[:2], Ranks()), rows


def warnings(patch):
    """A list that fills with the messages of the stage's warnings."""
    found = []
    patch.setattr(job, "warning", lambda message, remedy="": found.append(message))
    return found


def change_model(patch, change):
    """Lets the stage train on the model that `change` has had its hands on."""
    right = fit.load_model

    def adapted(task, its):
        model = right(task, its)
        change(model)
        return model

    patch.setattr(fit, "load_model", adapted)
