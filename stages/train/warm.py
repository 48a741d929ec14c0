"""Compiles and tunes the kernels that stage train will need under a recipe, so that its first start is as
fast as later ones.

    ANNIE_KERNELS=FOLDER python -m stages.train.warm job.json

This is no stage: it has no contract, makes no artifact and is in no key. `build.py warm` starts it with the
parameters of stage train (docs/formats.md, Kernels). It trains two steps of random weights: one full packed
sequence, and one step of the recipe's size. Kernels depend on shapes, not on weights or the number of layers,
so one layer of each kind is enough.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from model.families.nemotron_h import nano
from model.layers import determinism, kernel_cache, kernel_watch
from stages import job
from stages.job import Job, StageError
from stages.train import limits, start
from stages.train.parameters import Parameters

if TYPE_CHECKING:
    from model.layers.structure import Model
    from stages.train.pack import Order

STEPS = 2
HELD_OUT = 2  # held-out conversations; their losses take another path through the model
LENGTHS = range(150, 1400, 50)  # tokens of the conversations if stage data is not built yet


def run(task: Job) -> None:
    """Writes `warm.json`: how many kernels were `compiled`, `loaded` and `tuned`, and the `folder` and
    `bytes` of the cache.

    Raises StageError without a GPU, and if compiled kernels cannot be kept.
    """
    if task.device != "cuda":
        raise StageError(
            f"device {task.device}",
            "cuda: only what a GPU runs is compiled",
            "Run this on the machine that will train, with a recipe that says gpu: cuda",
        )
    if (folder := kernel_cache.folder()) is None:
        raise StageError(
            "no folder in which kernels stay",
            f"one that can be written, named in {kernel_cache.FOLDER}",
            "build.py warm names one by itself; by hand:"
            f" {kernel_cache.FOLDER}=FOLDER python -m stages.train.warm job.json",
        )
    from model.layers import tuning
    from stages.train import fit

    if task.parameters(Parameters).deterministic:
        determinism.enable()
    kernel_watch.start(fit.report_kernels)
    train(task)
    counts = kernel_watch.counts
    for name, count in vars(counts).items():
        job.metric(f"kernels {name}", count)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    report = {**vars(counts), "folder": folder.name, "bytes": size, "kernels": tuning.for_manifest()}
    (task.output / "warm.json").write_text(json.dumps(report, indent=1) + "\n")


def train(task: Job) -> None:
    """Runs two steps and a held-out loss in the loop of stage train."""
    from stages.train import fit
    from stages.train.loop import Loop
    from stages.train.ranks import Ranks

    params = task.parameters(Parameters)
    limits.require(params, params.ranks, None if params.epochs else params.steps)
    params = replace(
        params,
        steps=STEPS,
        warmup_steps=0,
        eval_every=STEPS,
        save_every=STEPS,
        patience=0,
        ranks=1,
        sharded=False,
        qat_share=0.5 if params.qat_share else 0.0,
        qat_loss="labels",
    )
    task, config = replace(task, params=asdict(params)), model_config(task)
    try:
        model = random_model(task, config)
    except ValueError as error:
        raise StageError(str(error), "libraries and a shape that fit", "See the message") from error
    lengths = conversation_lengths(task)
    full, usual = filling_lengths(lengths, params.sequence_tokens), first_step_lengths(task, lengths)
    rows = synthetic_rows([*full, *usual, *sorted(lengths)[:HELD_OUT]], config["vocab_size"])
    loop = Loop(task, model, rows, rows[-HELD_OUT:], Ranks(), fit.rounding_schedule(task, model, rows, None))
    loop.order = two_steps(len(full), len(usual))
    loop.run()


def two_steps(full: int, usual: int) -> Order:
    """An order of two steps: the first `full` rows, then the next `usual` rows."""
    from stages.train.pack import Order

    class Two(Order):
        def step(self, number: int) -> list[int]:
            return list((range(full), range(full, full + usual))[number])

    return Two([1] * (full + usual), 0, full)


def model_config(task: Job) -> dict[str, Any]:
    """The config of the recipe's base, reduced to one layer of each kind. If the base is not built yet, that
    of Nemotron 3 Nano, with a warning.
    """
    if "base" in task.inputs:
        config = json.loads((task.inputs["base"] / "config.json").read_text())
    else:
        job.warning(
            "the recipe's base is not built yet: kernels are compiled for the shape of Nemotron 3 Nano"
            " 30B-A3B",
            "If your base has another shape, build it (build.py run --until base) and run this again",
        )
        config = nano.WIDTHS | {"hybrid_override_pattern": nano.PATTERN}
    return {**config, "hybrid_override_pattern": shortest_pattern(config["hybrid_override_pattern"])}


def shortest_pattern(pattern: str) -> str:
    """The shortest pattern with a layer of each kind. A Mamba layer directly before attention is a kind of
    its own, because export and training leave it in BF16 (model/families/nemotron_h/layout.py).
    """
    chosen = [letter for letter in "*ME" if letter in pattern.replace("M*", "")]
    return "".join(chosen) + ("M*" if "M*" in pattern else "")


def random_model(task: Job, config: dict[str, Any]) -> Model:
    """A model with random weights and an adapter, set up as in stage train."""
    import torch

    from model import assemble
    from stages.train import fit, memory

    params = task.parameters(Parameters)
    memory.check(config, params, task.device)
    model = assemble.random(
        config, memory.METHODS[params.method], getattr(torch, params.precision), task.device
    )
    fit.adapt(model, params, task.seed)
    return model


def conversation_lengths(task: Job) -> list[int]:
    """Tokens of the recipe's conversations, or the lengths LENGTHS if stage data is not built yet. Each is
    cut to one packed sequence.
    """
    from stages.train import fit

    lengths = (
        fit.lengths(fit.read_rows(task.inputs["data"] / "train.jsonl"))
        if "data" in task.inputs
        else list(LENGTHS)
    )
    limit = task.parameters(Parameters).sequence_tokens
    return [min(length, limit) for length in lengths]


def filling_lengths(lengths: list[int], capacity: int) -> list[int]:
    """Lengths of conversations that fill a packed sequence of `capacity` tokens exactly. `lengths` is
    repeated as needed.
    """
    chosen: list[int] = []
    room = capacity
    while room:
        chosen.append(min(lengths[len(chosen) % len(lengths)], room))
        room -= chosen[-1]
    return chosen


def first_step_lengths(task: Job, lengths: list[int]) -> list[int]:
    """The lengths of the recipe's first step."""
    from stages.train.pack import Order

    params = task.parameters(Parameters)
    return [lengths[row] for row in Order(lengths, task.seed, params.batch, params.batch_tokens).step(0)]


def synthetic_rows(lengths: list[int], vocabulary: int) -> list[dict[str, Any]]:
    """Rows as stage data writes them, with random tokens. The last quarter of each row is trained."""
    import torch

    from model.labels import IGNORED

    numbers, rows = torch.Generator().manual_seed(0), []
    for number, length in enumerate(lengths):
        ids = torch.randint(0, vocabulary, (length,), generator=numbers).tolist()
        masked = length - max(1, length // 4)
        rows.append({"input_ids": ids, "labels": [IGNORED] * masked + ids[masked:], "number": number})
    return rows


if __name__ == "__main__":
    # The same as in stages/train/__main__.py.
    params = job.read(sys.argv[1]).params if len(sys.argv) == 2 else {}
    start.before_torch(job.warning, params.get("deterministic", False))
    job.main(run)
