"""Measures merge and quantise at the real widths, against a plain copy, PEFT and ModelOpt: seconds, GB/s of
BF16, peak memory.

    python -m bench.export FOLDER [--pattern ME*] [--rows copy,merge,weights]

Writes a random checkpoint with those layers (E, experts, is 2.6 GB; embeddings and head are 1.4) and an
adapter of rank 16 on all targets into FOLDER, once. Each row writes its output beside them. Every row is a
process of its own, and its time includes syncing its files to disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RANK = 16
GB = 1e9
TOKENS = 131072  # of the vocabulary


def checkpoint(folder: Path, pattern: str) -> Path:
    """Writes a checkpoint with the layers of `pattern`, unless it exists."""
    from bench.weights import Random
    from model.families.nemotron_h import nano
    from model.weights.checkpoint import Slot, write, write_index

    if (folder / "model.safetensors.index.json").exists():
        return folder
    config = nano.WIDTHS | {
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
    }
    source = Random(config, folder)
    groups = [
        (
            file,
            [
                Slot(name, source.entries[name].dtype, source.entries[name].shape)
                for name in source.names_in_file(file)
            ],
        )
        for file in source.files
    ]
    for file, slots in groups:
        write(folder / file, slots, lambda slot: source.pieces(slot.name))
    write_index(folder, groups)
    return folder


def adapter(folder: Path, base: Path) -> Path:
    """Writes an adapter on all targets in PEFT's format with random factors, unless it exists."""
    import torch
    from safetensors.torch import save_file

    from model import adapter as its
    from model import assemble
    from model.families.nemotron_h import targets
    from model.layers.projection import Projection
    from model.weights.checkpoint import Checkpoint

    if (folder / its.CONFIG).exists():
        return folder
    config = Checkpoint(base).config
    model = assemble.empty(config, "bf16", torch.bfloat16, "meta")
    chosen = targets.targets(config, "all")
    adapted, tensors = {linear.module for linear in targets.targeted(config, "all")}, {}
    peft_names = its.peft_names(model)
    for name, module in model.named_modules():
        if isinstance(module, Projection) and name in adapted:
            tensors[f"{peft_names[name]}.lora_A.weight"] = (
                torch.randn(module.experts * RANK, module.in_features) * 0.02
            )
            tensors[f"{peft_names[name]}.lora_B.weight"] = (
                torch.randn(module.out_features, RANK * module.experts) * 0.01
            )
    folder.mkdir(parents=True)
    save_file(tensors, folder / its.WEIGHTS)
    import peft

    peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        inference_mode=True,
        **chosen.arguments(),
    ).save_pretrained(str(folder))
    return folder


def copy(base: Path, adapter_folder: Path, output: Path) -> None:
    """Every file copied."""
    shutil.copytree(base, output, dirs_exist_ok=True)


def merge(base: Path, adapter_folder: Path, output: Path) -> None:
    """Stage merge, without its proofs."""
    from model.lora import Adapter
    from model.weights.checkpoint import Checkpoint
    from stages.merge.merge import stream

    source = Checkpoint(base)
    stream(source, Adapter(adapter_folder, source), output)


def proven(base: Path, adapter_folder: Path, output: Path) -> None:
    """Stage merge with its proof of the files, which reads both checkpoints again."""
    from model.lora import Adapter
    from model.weights.checkpoint import Checkpoint
    from stages.merge import proof
    from stages.merge.merge import stream

    source = Checkpoint(base)
    changes = Adapter(adapter_folder, source)
    changed = stream(source, changes, output)
    proof.check_files(source, Checkpoint(output), changes, changed)


def weights(base: Path, adapter_folder: Path, output: Path) -> None:
    """Stage quantize with weights only (W4A16), in NVIDIA's layout."""
    quantised(base, output, "w4a16", "own")


def nvfp4(base: Path, adapter_folder: Path, output: Path) -> None:
    """Stage quantize as W4A4: calibrated on 8 conversations of 512 tokens, packed, audited."""
    quantised(base, output, "w4a4", "own")


def modelopt(base: Path, adapter_folder: Path, output: Path) -> None:
    """The same with ModelOpt's calibration."""
    quantised(base, output, "w4a4", "modelopt")


def quantised(base: Path, output: Path, form: str, engine: str) -> None:
    import torch

    from stages.job import Job
    from stages.quantize import quantize

    (output.parent / "train.jsonl").write_text(
        "".join(json.dumps({"input_ids": row}) + "\n" for row in torch.randint(0, TOKENS, (8, 512)).tolist())
    )
    params = {
        "layout": "nvidia",
        "format": form,
        "scales": "nearest",
        "engine": engine,
        "kv_cache": "FP8",
        "calibration_rows": 8,
        "calibration_tokens": 512,
        "fidelity_tokens": 0,
    }
    quantize.run(Job("quantize", params, {"merge": base, "data": output.parent}, output, output, 0))


def peft(base: Path, adapter_folder: Path, output: Path) -> None:
    """PEFT's merge_and_unload of the whole model in BF16, saved by transformers."""
    import torch
    from peft import PeftModel

    from model.families.nemotron_h import native

    PeftModel.from_pretrained(
        native.load(base, torch.bfloat16), adapter_folder
    ).merge_and_unload().save_pretrained(output)


ROWS = {row.__name__: row for row in (copy, merge, proven, peft, weights, nvfp4, modelopt)}


def process(row: str, base: Path, adapter_folder: Path, output: Path) -> None:
    """Runs one row in this process. Prints its seconds and peak memory as JSON on the last line."""
    import torch

    torch.manual_seed(0)
    began = time.perf_counter()
    ROWS[row](base, adapter_folder, output)
    os.sync()
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - began,
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pattern", default="ME*", help="layers: M Mamba, E experts, * attention")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--repeats", type=int, default=2, help="of which the fastest counts")
    parser.add_argument("--process", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        row, *paths = options.process
        process(row, *map(Path, paths))
        return
    base, adapter_folder = options.folder / "base", options.folder / "adapter"
    # in a process of its own: a row's peak would begin with the peak of the process that starts it
    if not adapter_folder.exists():
        subprocess.run(
            [
                sys.executable,
                "-c",
                (
                    f"from pathlib import Path; from bench import export; export.adapter("
                    f"Path({str(adapter_folder)!r}),"
                    f" export.checkpoint(Path({str(base)!r}), {options.pattern!r}))"
                ),
            ],
            check=True,
        )
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    print(
        f"{options.pattern}, {size / GB:.2f} GB, {os.cpu_count()} cores\n{'row':8s} {'seconds':>8s}"
        f" {'GB/s':>6s} {'peak GB':>8s}",
        flush=True,
    )
    best: dict[str, dict[str, Any]] = {}
    for _ in range(options.repeats):  # in turn, so that what else the machine does falls on every row
        for row in options.rows.split(","):
            shutil.rmtree(output := options.folder / "output", ignore_errors=True)
            output.mkdir()
            finished = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "bench.export",
                    str(options.folder),
                    "--process",
                    row,
                    str(base),
                    str(adapter_folder),
                    str(output),
                ],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            measured = json.loads(finished.stdout.splitlines()[-1])
            best[row] = min(best.get(row, measured), measured, key=lambda figures: figures["seconds"])
    for row, figures in best.items():
        print(
            f"{row:8s} {figures['seconds']:8.1f} {size / figures['seconds'] / GB:6.2f}"
            f" {figures['peak'] / GB:8.2f}"
        )


if __name__ == "__main__":
    main()
