"""How many tokens the conversations of a step have: the distributions that the benches of training draw from.

    equal         2,048 tokens each
    mixed         650 to 1,400, evenly
    voice         150 to 400, evenly
    long          200 and more, long-tailed: 200 times a Pareto number of exponent 1.1, cut at 16,384
    sample        one of the repository's own conversations (data/sample), in tokens of the tiny recipe
    voice-packed  as many of 150 to 400 as fit into 16,384 tokens, whatever else a step has

A step has eight conversations, drawn anew for every step. The sample's counts are kept in
sample_lengths.json, since counting takes its tokenizer; after a change of data/sample, `python -m
bench.lengths` writes that file again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.stage_job import defaults
from model.labels import IGNORED

ROOT = Path(__file__).parents[1]
SAMPLE = Path(__file__).with_name("sample_lengths.json")
CAPACITY = 16384  # tokens of a packed sequence, as stage train has it by default
DOCUMENTS = 8  # conversations of a step
SEED = 7


@cache
def sample() -> tuple[int, ...]:
    """Tokens of every conversation of the sample data, in ascending order (sample_lengths.json)."""
    return tuple(json.loads(SAMPLE.read_text()))


LENGTHS: dict[str, Callable[[random.Random], int]] = {
    "equal": lambda chance: 2048,
    "mixed": lambda chance: chance.randint(650, 1400),
    "voice": lambda chance: chance.randint(150, 400),
    "long": lambda chance: min(CAPACITY, int(200 * chance.paretovariate(1.1))),
    "sample": lambda chance: chance.choice(sample()),
}
PACKED = {"voice-packed": "voice"}  # filled up to CAPACITY
KINDS = (*LENGTHS, *PACKED)


@dataclass(frozen=True)
class Conversation:
    """`ids` and `labels`, int64 (tokens,) on one device; `trained` is how many of the labels are."""

    ids: torch.Tensor
    labels: torch.Tensor
    trained: int


def kinds(text: str) -> list[str]:
    """The distributions of a comma-separated list. Raises ValueError for an unknown one."""
    names = text.split(",")
    if unknown := [name for name in names if name not in KINDS]:
        raise ValueError(f"--lengths {unknown[0]}: there are {', '.join(KINDS)}")
    return names


def plan(kind: str, steps: int, documents: int = DOCUMENTS) -> list[tuple[int, ...]]:
    """The lengths of the conversations of each of `steps` steps; the same on every call."""
    chance = random.Random(SEED)
    return [_step(kind, chance, documents) for _ in range(steps)]


def _step(kind: str, chance: random.Random, documents: int) -> tuple[int, ...]:
    if kind not in PACKED:
        return tuple(LENGTHS[kind](chance) for _ in range(documents))
    lengths: list[int] = []
    while sum(lengths) + (length := LENGTHS[PACKED[kind]](chance)) <= CAPACITY:
        lengths.append(length)
    return tuple(lengths)


def conversations(
    lengths: tuple[int, ...], vocabulary: int, seed: int, device: torch.device | str = "cpu"
) -> list[Conversation]:
    """Random tokens. The last quarter of every conversation is trained, but never its first token."""
    generator, drawn = torch.Generator().manual_seed(seed), []
    for length in lengths:
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        place = torch.arange(length)
        trained = (place >= length - max(1, length // 4)) & (place > 0)
        drawn.append(
            Conversation(ids.to(device), ids.masked_fill(~trained, IGNORED).to(device), int(trained.sum()))
        )
    return drawn


def count_sample() -> list[int]:
    """The lengths for sample_lengths.json: runs stage data on data/sample with the tokenizer that stage base
    trains for the tiny recipe.
    """
    from stages import dataset
    from stages.base import make
    from stages.data import prepare
    from stages.job import Job

    data = ROOT / "data" / "sample"
    vocabulary = defaults("base")["vocabulary"]
    sources = {
        "conversations": [data / "conversations"],
        "prompt": [data / "system_prompt.txt"],
        "tools": [data / "tools.json"],
    }
    with TemporaryDirectory() as scratch:
        folders = [Path(scratch, name) for name in ("base", "data", "scratch")]
        for folder in folders:
            folder.mkdir()
        make.make_tokenizer(make.read_lessons([data / "lessons.jsonl"]), vocabulary, folders[0])
        # stage data asks for its chat, and whether the model has a row for every token
        config = {"model_type": "nemotron_h", "vocab_size": vocabulary}
        (folders[0] / "config.json").write_text(json.dumps(config))
        prepare.run(
            Job(
                "data",
                defaults("data") | {"tools": "allow"},
                {"base": folders[0]},
                folders[1],
                folders[2],
                SEED,
                sources,
            )
        )
        return sorted(
            len(row["input_ids"])
            for part in ("train", "eval")
            for _, row in dataset.read(folders[1] / f"{part}.jsonl")
        )


if __name__ == "__main__":
    SAMPLE.write_text(json.dumps(count_sample()) + "\n")
