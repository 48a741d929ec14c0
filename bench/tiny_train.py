"""The tiny recipe's training on a CPU, two ways in one process: TRL and PEFT as they come, and stage train's own loop.

    python -m bench.tiny_train BASE DATA [STEPS]

BASE and DATA are what `build.py path base` and `build.py path data` print. Both train rank 32 on attention, eight conversations
a step, from the same base; blocks of steps alternate, so that what else the machine does falls on both.
"""

from __future__ import annotations

import sys
import time
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import peft
import torch
import transformers
import trl

from nemotron import native
from stages.job import Job
from stages.train import fit
from stages.train.loop import Loop
from stages.train.ranks import Ranks

CONTRACT = Path(__file__).parents[1] / "stages" / "train" / "stage.toml"
BLOCK = 10  # steps
CHANGES = {"rank": 32, "alpha": 64, "learning_rate": 3e-3, "batch": 8, "steps": 1000}


def plain(base: Path, rows: list[dict], folder: str) -> trl.SFTTrainer:
    """SFTTrainer on the class with its own Mamba forward, rows padded to the longest of their batch."""
    model = native.load(base)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    model.set_experts_implementation("eager")
    model.requires_grad_(False)
    config = peft.LoraConfig(r=32, lora_alpha=64, lora_dropout=0.0, task_type="CAUSAL_LM", **native.targets(model, "attention").arguments())
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token_id = 0
    settings = trl.SFTConfig(
        output_dir=folder, report_to="none", disable_tqdm=True, max_steps=BLOCK, per_device_train_batch_size=8, learning_rate=3e-3, use_cpu=True, bf16=False,
        optim="adamw_torch_fused", gradient_checkpointing=False, dataloader_pin_memory=False, max_length=None, packing=False,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, save_strategy="no", logging_steps=BLOCK, train_sampling_strategy="group_by_length")
    return trl.SFTTrainer(model=peft.get_peft_model(model, config), args=settings, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(rows))


def main(base: Path, data: Path, steps: int = 60) -> None:
    torch.set_num_threads(2)
    rows = fit.read(data / "train.jsonl")
    params = {name: row["default"] for name, row in tomllib.loads(CONTRACT.read_text())["parameters"].items()} | CHANGES
    with TemporaryDirectory() as folder:
        task = Job("train", params, {"base": base, "data": data}, Path(folder), Path(folder), 7)
        trainer, loop = plain(base, rows, folder), Loop(task, fit.adapted(task), rows, [], Ranks())
        loop.model.train()
        taken: dict[str, list[float]] = {"TRL and PEFT": [], "stage train": []}
        number = 0
        for block in range(-1, steps // BLOCK):
            began = time.perf_counter()
            trainer.train()
            middle = time.perf_counter()
            for _ in range(BLOCK):
                loop.step(number)
                number += 1
            if block >= 0:  # the first warms up
                taken["TRL and PEFT"].append((middle - began) / BLOCK)
                taken["stage train"].append((time.perf_counter() - middle) / BLOCK)
    for name, times in taken.items():
        print(f"{name:14s} {sorted(times)[len(times) // 2] * 1e3:7.1f} ms/step  ({min(times) * 1e3:.1f}-{max(times) * 1e3:.1f}, {len(times)} blocks of {BLOCK} steps)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
