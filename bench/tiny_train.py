"""The tiny recipe's training on a CPU in two ways: TRL and PEFT at their defaults, and stage train's own
loop.

    python -m bench.tiny_train [--lengths sample] [--steps 60] [--block 10]

Both train rank 32 on attention, eight conversations per step, from one base of the recipe's sizes with random
weights, on the same conversations (bench/lengths.py draws their lengths). Each is a process of its own. They
take turns, a block of steps each, so that other work on the machine affects both equally. Columns are those
of bench.train_step: first s is the time from the process's start to the end of its first step, peak is the
process's memory. A CPU compiles nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from bench import figures, lengths
from bench.stage_job import defaults

if TYPE_CHECKING:
    from model.layers.structure import Model

CHANGES: dict[str, Any] = {"rank": 32, "alpha": 64, "learning_rate": 3e-3, "batch": lengths.DOCUMENTS}
THREADS = 2  # as stages base and train
SEED = 7


def base(folder: Path) -> None:
    """Writes a base of the tiny recipe's sizes with random weights, and a tokenizer, which TRL needs."""
    import torch

    from model.families.nemotron_h import native
    from stages.base import tiny, tokenizer

    torch.manual_seed(SEED)
    sizes = defaults("base")
    description = tiny.config(sizes["pattern"], sizes["hidden"], sizes["experts"], sizes["vocabulary"])
    model = native.build(description)
    tiny.delicate_biases(model, SEED)
    tiny.save(model, description, folder)
    tokenizer.write(tokenizer.train(["words and again words"], 300), folder)


def rows(kind: str, steps: int) -> list[dict[str, Any]]:
    """The conversations of `steps` steps, in the form of stage data."""
    vocabulary, conversations = defaults("base")["vocabulary"], []
    for number, step in enumerate(lengths.plan(kind, steps)):
        conversations += [
            {"input_ids": conversation.ids.tolist(), "labels": conversation.labels.tolist()}
            for conversation in lengths.conversations(step, vocabulary, number)
        ]
    return [{**row, "number": number} for number, row in enumerate(conversations)]


class Turns:
    """One process's side of taking turns. After every `block` steps it writes its figures and waits for a
    line.
    """

    def __init__(self, block: int, descriptor: int) -> None:
        """`descriptor`: the file descriptor that figures are written to."""
        self.block, self.descriptor = block, descriptor
        self.times: list[float] = []
        self.tokens: list[int] = []  # of every step, or further
        self.computed: list[int] = []
        self.first = 0.0
        self.last = time.perf_counter()

    def step(self) -> None:
        """Call it after every step."""
        self.times.append(time.perf_counter() - self.last)
        self.first = self.first or time.time() - figures.started()
        count = len(self.times)
        if count % self.block == 0:
            summary = figures.summary(self.times, self.tokens[:count], self.computed[:count])
            summary |= {
                "first_s": self.first,
                "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            }
            os.write(self.descriptor, json.dumps(summary).encode() + b"\n")
            if not sys.stdin.readline():
                raise SystemExit("the other side is gone")
        self.last = time.perf_counter()


def trl(folder: Path, conversations: list[dict[str, Any]], steps: int, turns: Turns) -> None:
    """SFTTrainer on the class with its own Mamba forward; batches are padded to the longest conversation."""
    import datasets
    import peft
    import transformers
    from trl import SFTConfig, SFTTrainer

    from model.families.nemotron_h import native, targets
    from model.weights.checkpoint import Checkpoint

    class AfterStep(transformers.TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            turns.step()

    model = cast("Model", native.load(folder))
    for module in model.modules():
        module.__dict__.pop("forward", None)
    model.set_experts_implementation("eager")
    model.requires_grad_(False)
    config = peft.LoraConfig(
        r=CHANGES["rank"],
        lora_alpha=CHANGES["alpha"],
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        **targets.targets(Checkpoint(folder).config, "attention").arguments(),
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id = 0
    with TemporaryDirectory() as output:
        settings = SFTConfig(
            output_dir=output,
            report_to="none",
            disable_tqdm=True,
            max_steps=steps,
            per_device_train_batch_size=CHANGES["batch"],
            learning_rate=CHANGES["learning_rate"],
            use_cpu=True,
            bf16=False,
            optim="adamw_torch_fused",
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            max_length=None,
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            train_sampling_strategy="group_by_length",
        )
        trainer = SFTTrainer(
            model=peft.get_peft_model(model, config),
            args=settings,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(conversations),
            callbacks=[AfterStep()],
        )
        collate = trainer.data_collator

        def counting_collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = collate(examples)
            turns.tokens.append(int(batch["attention_mask"].sum()))
            turns.computed.append(batch["input_ids"].numel())
            return batch

        trainer.data_collator = counting_collate
        turns.last = time.perf_counter()
        trainer.train()


def stage(folder: Path, conversations: list[dict[str, Any]], steps: int, turns: Turns) -> None:
    """Stage train's loop, without its work between steps."""
    from stages.job import Job
    from stages.train import fit
    from stages.train.loop import Loop
    from stages.train.ranks import Ranks

    with TemporaryDirectory() as scratch:
        task = Job(
            "train",
            defaults("train") | CHANGES | {"steps": steps},
            {"base": folder},
            Path(scratch),
            Path(scratch),
            SEED,
        )
        loop = Loop(task, fit.load_model(task, Ranks()), conversations, [], Ranks())
        loop.model.train()
        turns.last = time.perf_counter()
        for number in range(steps):
            tokens = sum(len(conversations[row]["input_ids"]) for row in loop.order.step(number))
            turns.tokens.append(tokens)
            turns.computed.append(tokens)
            loop.step(number)
            turns.step()


ROWS = {"TRL and PEFT": trl, "stage train": stage}


def child(row: str, folder: Path, kind: str, steps: int, block: int) -> None:
    """Runs one row. stdout has the figures only; what libraries and the stage print is dropped."""
    descriptor, dropped = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(dropped, 1)
    import torch

    torch.set_num_threads(THREADS)
    ROWS[row](folder, rows(kind, steps), steps, Turns(block, descriptor))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--lengths", default="sample", choices=[kind for kind in lengths.KINDS if kind not in lengths.PACKED]
    )
    parser.add_argument("--steps", type=int, default=60, help="steps of each row")
    parser.add_argument(
        "--block", type=int, default=10, help="steps that a row does at a time, while the other waits"
    )
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.row:
        child(options.row, options.base, options.lengths, options.steps, options.block)
        return
    if options.block < 1 or options.steps < options.block or options.steps % options.block:
        raise SystemExit(f"--steps {options.steps} --block {options.block}: expected steps in whole blocks")
    sizes = ["--lengths", options.lengths, "--steps", str(options.steps), "--block", str(options.block)]
    with TemporaryDirectory() as folder:
        base(Path(folder))
        running: dict[str, subprocess.Popen[str]] = {}
        figures_of_row: dict[str, dict[str, Any]] = {}
        try:
            for block in range(options.steps // options.block):
                for row in ROWS:
                    if block:
                        pipe = running[row].stdin
                        assert pipe
                        pipe.write("\n")
                        pipe.flush()
                    else:
                        command = [
                            sys.executable,
                            "-m",
                            "bench.tiny_train",
                            *sizes,
                            "--row",
                            row,
                            "--base",
                            folder,
                        ]
                        running[row] = subprocess.Popen(
                            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                        )
                    if not (line := next(iter(running[row].stdout or ()), "")):
                        raise SystemExit(
                            f"{row}: its process ended with {running[row].wait()} in block {block + 1}; its"
                            " own words stand above"
                        )
                    figures_of_row[row] = json.loads(line)
        finally:
            for process in running.values():
                process.kill()
                process.wait()
    print(
        f"{options.lengths} lengths, {options.steps} steps of {lengths.DOCUMENTS} conversations, {THREADS}"
        f" threads on {os.cpu_count()} cores"
    )
    print(
        figures.table(
            [
                {"row": row, "lengths": options.lengths, **row_figures}
                for row, row_figures in figures_of_row.items()
            ]
        )
    )


if __name__ == "__main__":
    main()
