"""One fine-tuning run: base and tokens in, adapter and loss curve out.

TRL's SFTTrainer on the native class with its repairs (nemotron/native.py); rows come tokenised and masked from `data`, so
training and serving cannot disagree about the template. The router is frozen and adapters are float32 throughout, which
makes a resumed run equal to one that was never interrupted.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from nemotron import native
from nemotron.chat import IGNORED, PAD
from stages import job
from stages.train import checkpoints, order, picture
from stages.train.watch import Learning, Watch

UNPACKED_SHARE = 0.5  # qlora warns when more than this share of the weights' bytes is not in 4 bits


def run(task: job.Job) -> None:
    """Trains and writes `adapter/`, `training.json`, `loss.jsonl` and `loss.png`."""
    began = time.monotonic()
    torch.manual_seed(task.seed)
    if task.device == "cpu":
        torch.set_num_threads(2)  # small matrices gain from a second core and lose from a third; and sums come out the same everywhere
    rows, held_out = read(task.inputs["data"] / "train.jsonl"), read(task.inputs["data"] / "eval.jsonl")
    model = adapted(task)
    trainer = make_trainer(task, model, rows, held_out)
    resume = resume_from(task.scratch)
    if resume and checkpoints.number(resume) == task.params["steps"]:
        history = restore(model, resume)  # the Trainer would take one step more
    else:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        history = trainer.state.log_history
    finish(task, model, history, rows, time.monotonic() - began)


def read(path: Path) -> list[dict]:
    """`input_ids` and `labels` of every row; both are lists of equal length. Raises StageError on an empty file."""
    rows = []
    with path.open() as opened:
        for line in opened:
            row = json.loads(line)
            rows.append({"input_ids": row["input_ids"], "labels": row["labels"]})
    if not rows:
        raise job.StageError(f"{path.name} has no rows", "at least one conversation", "Look at stats.json and rejects.jsonl of stage data")
    return rows


def adapted(task: job.Job) -> torch.nn.Module:
    """The base with a fresh adapter on it, everything else frozen. Raises StageError where that cannot be."""
    import peft

    params = task.params
    four_bit = params["method"] == "qlora"
    try:
        model = native.load(task.inputs["base"], getattr(torch, params["precision"]), task.device, four_bit)
        chosen = native.targets(model, params["targets"])
    except native.NativeError as error:
        raise job.StageError(str(error), "libraries and a model that fit", "See the message") from error
    if task.device == "cpu":
        model.set_experts_implementation("eager")  # a loop over experts; the grouped product is slower here
    model.requires_grad_(False)
    config = peft.LoraConfig(r=params["rank"], lora_alpha=params["alpha"], lora_dropout=0.0, task_type="CAUSAL_LM", **chosen.arguments())
    model = peft.get_peft_model(model, config)
    if four_bit:
        packed(model)
    return model


def packed(model: torch.nn.Module) -> None:
    """Says which share of the base is in 4 bits: bitsandbytes packs Linears only, and the experts are no Linears."""
    groups = {name: row for name, row in native.bytes_by_group(model).items() if name not in ("adapter", "embeddings")}
    whole = sum(row["bytes"] for row in groups.values())
    four = sum(row["four_bit"] for row in groups.values())
    if not four:
        raise job.StageError("no weight is in 4 bits", "qlora to pack the Linear layers", "Install bitsandbytes for this device, or use method lora")
    if (whole - four) / whole > UNPACKED_SHARE:
        left = max(groups, key=lambda name: groups[name]["bytes"] - groups[name]["four_bit"])
        job.warning(
            f"qlora holds only {four / whole:.0%} of the layers' bytes in 4 bits; {left} keeps {groups[left]['bytes'] / 1e6:,.1f} MB unpacked",
            "The native class holds experts as 3-D parameters, which bitsandbytes does not touch: plan memory for them, or use method lora",
        )


def make_trainer(task: job.Job, model: torch.nn.Module, rows: list[dict], held_out: list[dict]):
    """An SFTTrainer over tokenised rows, with the adapter in float32.

    Padding is id 0: the tokenizer has no pad token, and its eos would mask every end.
    """
    import datasets
    import transformers
    import trl

    params = task.params
    tokenizer = transformers.AutoTokenizer.from_pretrained(task.inputs["base"])
    tokenizer.pad_token_id = PAD
    config = trl.SFTConfig(
        output_dir=str(task.scratch), seed=task.seed, data_seed=task.seed, report_to="none", disable_tqdm=True,
        max_steps=params["steps"], per_device_train_batch_size=params["batch"], per_device_eval_batch_size=2 * params["batch"],
        gradient_accumulation_steps=params["accumulation"], learning_rate=params["learning_rate"], warmup_steps=params["warmup_steps"],
        lr_scheduler_type="cosine", weight_decay=params["weight_decay"], max_grad_norm=params["max_grad_norm"], optim="adamw_torch_fused",
        gradient_checkpointing=params["gradient_checkpointing"], bf16=False, use_cpu=task.device == "cpu",
        dataloader_pin_memory=False, max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False, logging_steps=1, logging_nan_inf_filter=False,
        eval_strategy="steps", eval_steps=params["eval_every"], save_strategy="steps", save_steps=params["save_every"], save_total_limit=2,
    )
    lengths, step = [len(row["input_ids"]) for row in rows], params["batch"] * params["accumulation"]
    trainer = trl.SFTTrainer(
        model=model, args=config, processing_class=tokenizer, callbacks=[Watch(round(sum(lengths) / len(rows) * step)), Learning(model)],
        train_dataset=datasets.Dataset.from_list(rows), eval_dataset=datasets.Dataset.from_list(held_out) if held_out else None,
    )
    trainer._get_train_sampler = lambda dataset=None: order.ByLength(lengths, step, task.seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # last of all: on a 4-bit base TRL has just made the adapter BF16
    return trainer


def resume_from(scratch: Path) -> Path | None:
    """The checkpoint to go on from; torn ones are named and passed over."""
    found, torn = checkpoints.newest(scratch)
    for folder in torn:
        job.warning(f"{folder.name} was torn by a kill in the middle of its save", f"Going on from {found.name if found else 'the start'}")
    return found


def restore(model: torch.nn.Module, checkpoint: Path) -> list[dict]:
    """Puts a checkpoint's adapter into `model`; the Trainer's log up to it."""
    import peft
    from safetensors.torch import load_file

    peft.set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def finish(task: job.Job, model: torch.nn.Module, history: list[dict], rows: list[dict], seconds: float) -> None:
    """Writes the artifact from the trained model and the Trainer's log, and judges how far the loss fell."""
    params = task.params
    save(model, task.output / "adapter")
    train = {row["step"]: row["loss"] for row in history if "loss" in row}
    held_out = {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}
    with (task.output / "loss.jsonl").open("w") as opened:
        for step in sorted(train.keys() | held_out.keys()):
            line = {"step": step, "train": train.get(step), "held_out": held_out.get(step)}
            opened.write(json.dumps({key: value for key, value in line.items() if value is not None}) + "\n")
    first, last, best = ends(list(train.values()))
    drop = 1 - last / first
    picture.draw(train, held_out, drop, task.output / "loss.png")

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report = {
        "method": params["method"], "targets": params["targets"], "rank": params["rank"], "alpha": params["alpha"], "steps": params["steps"],
        "trainable": trainable, "parameters": sum(p.numel() for p in model.parameters()), "groups": native.bytes_by_group(model),
        "conversations": len(rows), "trained_tokens": sum(label != IGNORED for row in rows for label in row["labels"]),
        "loss": {"first": first, "last": last, "best": best, "drop": drop, "held_out": held_out[max(held_out)] if held_out else None},
        "seconds": round(seconds, 1),
    }
    (task.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    job.metric("loss drop", drop)
    if drop < params["min_loss_drop"]:
        found, wanted = f"the loss fell by {drop:.0%}, from {first:.3f} to {last:.3f}", f"at least {params['min_loss_drop']:.0%}"
        if params["require_loss_drop"]:
            raise job.StageError(found, wanted, "Train for more steps, raise rank or learning_rate, or choose targets: all")
        job.warning(f"{found}; wanted {wanted}", "Train for more steps, raise rank or learning_rate, or choose targets: all")


def save(model: torch.nn.Module, folder: Path) -> None:
    """The adapter in peft's own form, less what peft adds that differs from machine to machine or run to run."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = None  # a path of this machine, which save_pretrained puts in even where it was taken out
    config["target_modules"].sort()  # a set in peft, so in another order in every process
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def ends(losses: list[float]) -> tuple[float, float, float]:
    """First, last and best loss. First is the very first step's, before anything was learnt; the others are means of ten steps."""
    windows = [sum(losses[at : at + 10]) / len(losses[at : at + 10]) for at in range(max(1, len(losses) - 9))]
    return losses[0], windows[-1], min(windows)
