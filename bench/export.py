"""Merge and quantise at the real widths, against a plain copy, PEFT and ModelOpt: seconds, GB/s of BF16, peak memory.

    python -m bench.export FOLDER [--pattern ME*] [--rows copy,merge,peft]

Writes a random checkpoint of those layers (E, experts, is 2.6 GB; embeddings and head are 1.4) and an adapter of rank 16 on all targets
into FOLDER, once, and what each row makes beside them. Every row is a process of its own, and its time ends
when its files are on the disk.
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

RANK = 16
GB = 1e9


def checkpoint(folder: Path, pattern: str) -> Path:
    """A checkpoint of the layers of `pattern` in shards of 4 GB: one random block, cut anew for every tensor."""
    import torch

    from bench import operations
    from nemotron import names
    from nemotron.checkpoint import DTYPES, Slot, shards, write, write_index

    if (folder / "config.json").exists():
        return folder
    config = operations.WIDTHS | {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern), "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h"}
    folder.mkdir(parents=True, exist_ok=True)
    block = torch.randn(2**26, generator=torch.Generator().manual_seed(0)) * 0.02

    def produce(slot: Slot) -> torch.Tensor:
        count, start = torch.Size(slot.shape).numel(), hash(slot.name) % 10007
        made = torch.cat([block[start:]] * (1 + count // (len(block) - start)))[:count].view(slot.shape)
        return made.abs().to(DTYPES[slot.dtype]) if slot.name.endswith(("A_log", "norm.weight", "norm_f.weight")) else made.to(DTYPES[slot.dtype])

    groups = shards([Slot(name, spec.dtype, spec.shape) for name, spec in names.tensors(config).items()], 4 * 10**9)
    for name, group in groups:
        write(folder / name, group, produce)
    write_index(folder, groups)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter(folder: Path, base: Path) -> Path:
    """An adapter on all targets, as PEFT writes it, with random factors."""
    import torch
    from safetensors.torch import save_file

    from nemotron import adapter as its
    from nemotron import assemble, native
    from nemotron.checkpoint import Checkpoint
    from nemotron.projection import Projection

    if (folder / its.CONFIG).exists():
        return folder
    model = assemble.empty(Checkpoint(base).config, "bf16", torch.bfloat16, "meta")
    chosen = native.targets(model, "all")
    endings, tensors = tuple(f".{name}" for name in (*chosen.target_modules, *chosen.target_parameters)), {}
    for name, module in model.named_modules():
        if isinstance(module, Projection) and name.endswith(endings):
            tensors[f"{its._key(name)}.lora_A.weight"] = torch.randn(module.experts * RANK, module.in_features) * 0.02
            tensors[f"{its._key(name)}.lora_B.weight"] = torch.randn(module.out_features, RANK * module.experts) * 0.01
    folder.mkdir(parents=True)
    save_file(tensors, folder / its.WEIGHTS)
    import peft

    peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, task_type="CAUSAL_LM", inference_mode=True, **chosen.arguments()).save_pretrained(folder)
    return folder


def copy(base: Path, its: Path, output: Path) -> None:
    """Every file copied."""
    shutil.copytree(base, output, dirs_exist_ok=True)


def merge(base: Path, its: Path, output: Path) -> None:
    """Stage merge, without its proofs."""
    from nemotron.checkpoint import Checkpoint
    from nemotron.lora import Adapter
    from stages.merge.merge import stream

    source = Checkpoint(base)
    stream(source, Adapter(its, source), output)


def proven(base: Path, its: Path, output: Path) -> None:
    """Stage merge, and its proof of the files: both checkpoints read once more."""
    from nemotron.checkpoint import Checkpoint
    from nemotron.lora import Adapter
    from stages.merge import proof
    from stages.merge.merge import stream

    source = Checkpoint(base)
    changes = Adapter(its, source)
    changed = stream(source, changes, output)
    proof.files(source, Checkpoint(output), changes, changed)


def peft(base: Path, its: Path, output: Path) -> None:
    """PEFT's merge_and_unload of the whole model in BF16, saved by transformers."""
    import torch
    from peft import PeftModel

    from nemotron import native

    PeftModel.from_pretrained(native.load(base, torch.bfloat16), its).merge_and_unload().save_pretrained(output)


ROWS = {row.__name__: row for row in (copy, merge, proven, peft)}


def process(row: str, base: Path, its: Path, output: Path) -> None:
    """One row in this process; prints its seconds and peak memory as JSON on the last line."""
    import torch

    torch.manual_seed(0)
    before = time.perf_counter()
    ROWS[row](base, its, output)
    os.sync()
    print(json.dumps({"seconds": time.perf_counter() - before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


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
        return process(row, *map(Path, paths))
    base = checkpoint(options.folder / "base", options.pattern)
    its = adapter(options.folder / "adapter", base)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    print(f"{options.pattern}, {size / GB:.2f} GB, {os.cpu_count()} cores\n{'row':8s} {'seconds':>8s} {'GB/s':>6s} {'peak GB':>8s}", flush=True)
    found: dict[str, dict] = {}
    for _ in range(options.repeats):  # in turn, so that what else the machine does falls on every row
        for row in options.rows.split(","):
            shutil.rmtree(output := options.folder / "output", ignore_errors=True)
            output.mkdir()
            ran = subprocess.run([sys.executable, "-m", "bench.export", str(options.folder), "--process", row, str(base), str(its), str(output)], check=True, stdout=subprocess.PIPE, text=True)
            its_figures = json.loads(ran.stdout.splitlines()[-1])
            found[row] = min(found.get(row, its_figures), its_figures, key=lambda figures: figures["seconds"])
    for row, figures in found.items():
        print(f"{row:8s} {figures['seconds']:8.1f} {size / figures['seconds'] / GB:6.2f} {figures['peak'] / GB:8.2f}")


if __name__ == "__main__":
    main()
