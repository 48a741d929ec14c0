"""Whether stage merge accepts what stage train made on a GPU, and refuses the same adapter once it is
doctored; and how long merge and quantize take from the start of their process to its exit.

    python -m bench.merge_check all --folder /tmp/check --out OUT [--tiny]
    python -m bench.merge_check base|data|train|merge|quantize|doctored --folder /tmp/check --out OUT [--tiny]

`base` makes random weights at the real model's widths in seven layers (MEM*EME), `data` conversations of
random tokens, `train` runs stage train (qlora, all targets, rank 16, 40 steps at the default learning rate),
`merge` stage merge on its adapter, `quantize` stage quantize on the merge, and `doctored` proves merges of
doctored copies of the adapter against the adapter itself: one layer's scale halved, two experts exchanged,
up_proj's factors of two experts exchanged, one factor's sign turned. A copy is doctored in its tensors alone,
so it is a well-formed adapter, and its merge is what a wrong reading of the adapter would have written. The
proof has to refuse each by the tensor's name. Every part's outcome is printed at once and kept in
OUT/merge_check.json; one part's failure does not stop the others. `--tiny` takes small widths, for a CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench import stage_job
from model.families.nemotron_h import nano
from model.families.nemotron_h.names import tensors
from model.weights.checkpoint import Checkpoint, Slot, shards, write, write_index
from stages.base import tiny

PATTERN = "MEM*EME"
STEPS, RANK = 40, 16
SHARD_BYTES = 5_000_000_000
# Of what Nemotron 3 Nano's config.json has, the widths that stages.base.tiny writes.
WIDE = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "mamba_num_heads",
    "mamba_head_dim",
    "n_groups",
    "ssm_state_size",
    "chunk_size",
    "vocab_size",
)
REAL = {key: nano.WIDTHS[key] for key in WIDE}
FIGURES = (
    "adapter_effect",
    "rounding_error",
    "merge_error",
    "greedy_agreement",
    "worst_layer",
    "idle",
    "too_small",
    "compared_with_peft",
)
START = time.monotonic()


def config(small: bool) -> dict[str, Any]:
    small_config = tiny.config(PATTERN, 128, 8, 512)
    return small_config if small else small_config | REAL


def base(folder: Path, small: bool, device: str) -> dict[str, Any]:
    """Writes random weights, one tensor at a time, made on the device."""
    target, description = folder / "base", config(small)
    target.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(0)
    layout = shards(
        [Slot(name, spec.dtype, spec.shape) for name, spec in tensors(description).items()], SHARD_BYTES
    )
    for file, slots in layout:
        write(target / file, slots, lambda slot: value(slot, generator, device))
    write_index(target, layout)
    (target / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    (target / "generation_config.json").write_text("{}\n")
    return {"GB": sum(path.stat().st_size for path in target.iterdir()) / 1e9}


def value(slot: Slot, generator: torch.Generator, device: str) -> torch.Tensor:
    """One tensor, with values as large as a newly initialised model's."""
    last = slot.name.split(".")
    if last[-1] == "A_log":
        tensor = torch.arange(1, slot.shape[0] + 1).float().log()
    elif last[-1] == "dt_bias":
        tensor = torch.full(slot.shape, -3.0)
    elif last[-1] == "e_score_correction_bias":
        tensor = torch.zeros(slot.shape)
    elif last[-1] == "D" or "norm" in last[-2] or last[-1] == "norm":
        tensor = torch.ones(slot.shape)
    elif last[-1] == "bias":
        tensor = torch.zeros(slot.shape)
    else:
        tensor = 0.02 * torch.randn(slot.shape, generator=generator, device=device)
    return tensor.to(torch.float32 if slot.dtype == "F32" else torch.bfloat16).cpu()


def data(folder: Path, small: bool) -> dict[str, Any]:
    """Writes sixty-four conversations of one length. They use a tenth of the vocabulary, so that there is
    something to learn.
    """
    vocabulary, length = config(small)["vocab_size"], 64 if small else 512
    torch.manual_seed(0)
    conversations = torch.randint(20, vocabulary // 10, (64, length)).tolist()
    stage_job.write_rows(folder / "data", conversations)
    return {"conversations": len(conversations), "tokens": length}


def stage(
    name: str, folder: Path, device: str, inputs: dict[str, Path], output: Path, **params: object
) -> dict[str, Any]:
    """Runs `python -m stages.<name> job.json`. Returns its seconds, the second of each phase's first event,
    the last error if it failed, and its warnings.
    """
    command = stage_job.command(
        name, folder / f"{name}.json", device, inputs, output, folder / f"scratch-{name}", params
    )
    began = time.monotonic()
    events: list[dict[str, Any]] = []
    phases: dict[str, float] = {}
    with (folder / f"{name}.log").open("w") as log:
        run = subprocess.Popen(command, cwd=stage_job.REPO, stdout=subprocess.PIPE, stderr=log, text=True)
        assert run.stdout is not None
        for line in run.stdout:
            events.append(json.loads(line))
            phases.setdefault(phase(events[-1]), round(time.monotonic() - began, 1))
        run.wait()
    facts: dict[str, Any] = {
        "seconds": round(time.monotonic() - began, 1),
        "exit": run.returncode,
        "phases": phases,
    }
    facts["warnings"] = [event["message"][:300] for event in events if event["event"] == "warning"]
    if error := next((e for e in events if e["event"] == "error"), None):
        facts["error"] = f"{error['found']}; expected {error['expected']}"
    elif run.returncode:
        facts["error"] = (folder / f"{name}.log").read_text()[-1500:]
    return facts


def phase(event: dict[str, Any]) -> str:
    """The phase of a stage, from one of its events: the note, or the unit of a note with figures."""
    note: str = event.get("note") or event.get("name") or event["event"]
    unit: str = event.get("unit", "event")
    return unit if any(map(str.isdigit, note)) else note


def train(folder: Path, small: bool, device: str) -> dict[str, Any]:
    params = {
        "method": "qlora",
        "targets": "all",
        "rank": RANK,
        "steps": STEPS,
        "eval_every": STEPS,
        "save_every": 1000,
        "precision": "float32" if small else "bfloat16",
    }
    inputs = {"base": folder / "base", "data": folder / "data"}
    facts = stage("train", folder, device, inputs, folder / "train", **params)
    if (folder / "train" / "loss.jsonl").exists():
        rows = [json.loads(line) for line in (folder / "train" / "loss.jsonl").read_text().splitlines()]
        losses = [row["train"] for row in rows if "train" in row]
        facts |= {"first_loss": losses[0], "last_loss": losses[-1]}
    return facts


def merge(folder: Path, device: str) -> dict[str, Any]:
    inputs = {"base": folder / "base", "train": folder / "train", "data": folder / "data"}
    facts = stage("merge", folder, device, inputs, folder / "merged", proof_precision="bfloat16")
    if (folder / "merged" / "merge.json").exists():
        figures = json.loads((folder / "merged" / "merge.json").read_text())
        facts |= {
            key: len(figure) if key in ("idle", "too_small") else figure for key, figure in figures.items()
        }
    return facts


def quantize(folder: Path, device: str) -> dict[str, Any]:
    """Stage quantize with its defaults, calibrated on the conversations that train had."""
    inputs = {"merge": folder / "merged", "data": folder / "data"}
    facts = stage("quantize", folder, device, inputs, folder / "quantized")
    if not facts["exit"]:
        facts["GB"] = sum(path.stat().st_size for path in (folder / "quantized").iterdir()) / 1e9
    return facts


def doctors() -> dict[str, Callable[[dict[str, torch.Tensor]], str]]:
    """Name of a fault -> a function that makes it in a copy of the adapter's tensors, and returns what the
    refusal must contain.
    """
    layer = PATTERN.index("E")  # the first, so that the proof ends early

    def half_scale(copy: dict[str, torch.Tensor]) -> str:
        for key in copy:
            if f".layers.{layer}." in key and "lora_B" in key:
                copy[key] = copy[key] / 2
        return f"layers.{layer}."

    def exchanged(copy: dict[str, torch.Tensor], wrappers: tuple[str, ...]) -> str:
        """The two experts that learned most exchange their changes."""
        first, second = busiest(copy, layer)
        for wrapper in wrappers:
            a, b = (
                f"base_model.model.model.layers.{layer}.mixer.{wrapper}.lora_{side}.weight" for side in "AB"
            )
            by_expert = copy[a].view(-1, RANK, copy[a].shape[1]).clone()
            by_expert[[first, second]] = by_expert[[second, first]]
            copy[a] = by_expert.flatten(0, 1)
            by_rank = copy[b].view(copy[b].shape[0], RANK, -1).clone()
            by_rank[:, :, [first, second]] = by_rank[:, :, [second, first]]
            copy[b] = by_rank.flatten(1)
        return f"layers.{layer}.mixer.experts."

    def turned(copy: dict[str, torch.Tensor]) -> str:
        key = next(key for key in copy if "q_proj.lora_A" in key)
        copy[key] = -copy[key]
        return "q_proj"

    return {
        f"scale of layer {layer} halved": half_scale,
        "two experts exchanged": lambda copy: exchanged(copy, ("experts.base_layer", "experts")),
        "up_proj of two experts exchanged": lambda copy: exchanged(copy, ("experts.base_layer",)),
        "sign of q_proj's A turned": turned,
    }


def busiest(state: dict[str, torch.Tensor], layer: int) -> list[int]:
    """The two experts of a layer with the largest B."""
    b = state[f"base_model.model.model.layers.{layer}.mixer.experts.base_layer.lora_B.weight"]
    largest: list[int] = b.view(b.shape[0], RANK, -1).norm(dim=(0, 1)).topk(2).indices.tolist()
    return largest


def doctored(folder: Path, device: str, limit: float) -> dict[str, Any]:
    """Merges each doctored copy and proves the merge against the original adapter. Returns what was refused,
    and by which name.
    """
    from model.lora import Adapter
    from stages import job
    from stages.job import StageError
    from stages.merge import proof
    from stages.merge.merge import stream
    from stages.merge.parameters import Parameters
    from stages.merge.peft_reading import PeftReading

    job._events = (folder / "doctored.log").open("w")
    source = folder / "train" / "adapter"
    state = load_file(source / "adapter_model.safetensors")
    checkpoint = Checkpoint(folder / "base")
    adapter = Adapter(source, checkpoint)
    facts: dict[str, dict[str, Any]] = {}
    for fault, doctor in doctors().items():
        if time.monotonic() - START > limit:
            facts[fault] = {"skipped": f"after {limit} s"}
            continue
        copy, target, output = dict(state), folder / "doctored", folder / "doctored-merged"
        for path in (target, output):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        expected, began = doctor(copy), time.monotonic()
        save_file(copy, target / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(source / "adapter_config.json", target / "adapter_config.json")
        changed = stream(checkpoint, Adapter(target, checkpoint), output)
        merged, reading = Checkpoint(output), PeftReading(source, adapter.tensors, checkpoint.config, device)
        params = Parameters(proof_tokens=512, proof_precision="bfloat16", control=False)
        try:
            proof.check_files(checkpoint, merged, adapter, changed)
            proof.check_forward(
                checkpoint, adapter, merged, reading, folder / "data" / "train.jsonl", params, device
            )
            facts[fault] = {"by_name": False, "words": "accepted"}
        except StageError as error:
            facts[fault] = {"by_name": expected in error.found, "words": error.found}
        facts[fault]["seconds"] = round(time.monotonic() - began, 1)
        print(f"  {fault}: {facts[fault]['words'][:160]}", flush=True)
    return facts


def parts(folder: Path, small: bool, device: str, limit: float) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "base": lambda: base(folder, small, device),
        "data": lambda: data(folder, small),
        "train": lambda: train(folder, small, device),
        "merge": lambda: merge(folder, device),
        "quantize": lambda: quantize(folder, device),
        "doctored": lambda: doctored(folder, device, limit),
    }


def table(facts: dict[str, dict[str, Any]]) -> str:
    """One table of all checks."""
    rows = [("what", "seconds", "outcome")]
    if row := facts.get("train"):
        losses = f"loss {row.get('first_loss')} to {row.get('last_loss')}"
        rows.append(
            (f"qlora, all targets, {STEPS} steps", str(row.get("seconds")), row.get("error") or losses)
        )
    if row := facts.get("merge"):
        if "error" in row:
            rows.append(("its merge", str(row.get("seconds")), row["error"]))
        else:
            rows.append(("its merge", str(row["seconds"]), "accepted"))
            rows += [(f"  {key}", "", str(row.get(key))) for key in FIGURES]
    if row := facts.get("quantize"):
        rows.append(("its NVFP4", str(row.get("seconds")), row.get("error") or f"{row['GB']:.1f} GB"))
    for fault, row in facts.get("doctored", {}).items():
        if isinstance(row, dict) and "words" in row:
            rows.append(
                (
                    fault,
                    str(row["seconds"]),
                    ("refused by name: " if row["by_name"] else "NOT BY NAME: ") + row["words"][:200],
                )
            )
        elif isinstance(row, dict):
            rows.append((fault, "", str(row)))
        elif fault == "error":
            rows.append(("doctored", "", row))
    return "\n".join(f"{label:36s} | {seconds:7s} | {outcome}" for label, seconds, outcome in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["all", "base", "data", "train", "merge", "quantize", "doctored"])
    parser.add_argument(
        "--folder", type=Path, required=True, help="where checkpoints lie; 30 GB at the real widths"
    )
    parser.add_argument("--out", type=Path, required=True, help="where merge_check.json and the logs go")
    parser.add_argument("--tiny", action="store_true", help="small widths")
    parser.add_argument(
        "--limit", type=float, default=450, help="seconds after which no further doctored copy is begun"
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.folder.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    device_name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    facts: dict[str, dict[str, Any]] = {
        "machine": {"device": device_name, "torch": torch.__version__, "tiny": options.tiny}
    }
    failed = False
    for name, part in parts(options.folder, options.tiny, device, options.limit).items():
        if options.part not in ("all", name):
            continue
        began = time.monotonic()
        try:
            facts[name] = part()
        except Exception as error:  # the other parts may still say something
            facts[name] = {"error": f"{type(error).__name__}: {error}"}
        facts[name].setdefault("seconds", round(time.monotonic() - began, 1))
        unnamed = [
            row for row in facts[name].values() if isinstance(row, dict) and row.get("by_name") is False
        ]
        failed = failed or "error" in facts[name] or bool(unnamed)
        print(name, json.dumps(facts[name])[:3000], flush=True)
        (options.out / "merge_check.json").write_text(json.dumps(facts, indent=2) + "\n")
        for log in options.folder.glob("*.log"):
            (options.out / log.name).write_text(log.read_text()[-2_000_000:])
    print(f"\n{device_name}, torch {torch.__version__}\n{table(facts)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
