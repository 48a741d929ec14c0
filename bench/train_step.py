"""One optimizer step of 8 x 2,048 tokens on one GPU, measured for each way of training in the same process.

    python -m bench.train_step --rows notebook,peft,ours --layers 52 --steps 3 --json step.json

Rows: `notebook` (the lab notebook's recipe), `peft` (transformers and PEFT with the Mamba kernels they find), `peft-torch`
(the same without), `ours` (NF4, all targets), or `ours-FORM-TARGETS` as in ours-nvfp4-attention. Weights are random and packed. A row that cannot run says why in its line, and the bench goes on.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from bench import operations
from bench.labels import Labels
from bench.row import DoesNotFit, Row

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "mamba-ssm")
TURN = 512  # tokens of a question and its answer; the last quarter is the answer, and trained


def builder(name: str) -> Callable[[dict, torch.device], Row]:
    """(config, device) -> Row for a row's name. Imported only here, so that a missing library costs one row."""
    if name.startswith("ours"):
        from bench.ours import ours

        form, _, targets = name.removeprefix("ours").removeprefix("-").partition("-")
        return lambda config, device: ours(config, device, form or "nf4", targets or "all")
    from bench import baselines

    known = {
        "notebook": baselines.notebook,
        "peft": baselines.peft_today,
        "peft-torch": lambda config, device: baselines.peft_today(config, device, scan="torch"),
    }
    if name not in known:
        raise SystemExit(f"--rows {name}: there are {', '.join([*known, 'ours'])}")
    return known[name]


def batch(config: dict, rows: int, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels, both (rows, length) int64; labels lie on their own tokens, -100 where nothing is trained."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, config["vocab_size"], (rows, length), generator=generator)
    turn = min(TURN, length)
    trained = torch.arange(length) % turn >= turn - turn // 4
    return ids.to(device), ids.masked_fill(~trained, -100).to(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceiling(device: torch.device) -> float:
    """Operations per second of a large BF16 product of random matrices (8192 cubed; 512 on a CPU, where it only fills the column)."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize(device)
    began = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronize(device)
    return 10 * 2 * n**3 / (time.perf_counter() - began)


def measure(name: str, config: dict, device: torch.device, ids: torch.Tensor, labels: torch.Tensor, steps: int, top: float, profiled: bool) -> dict:
    """Builds one row, measures it and frees it. Times in ms, memory in GiB."""
    cuda, tokens = device.type == "cuda", ids.numel()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    row = builder(name)(config, device)
    try:
        synchronize(device)
        found: dict = {"row": name, "build_s": time.perf_counter() - began, "note": row.note}
        if cuda:
            found |= {"built_gib": torch.cuda.memory_allocated(device) / 2**30, "build_peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}
            torch.cuda.reset_peak_memory_stats(device)
        first = slice(0, 1) if row.slow else slice(None)
        row.step(ids[first], labels[first])
        if row.slow:
            steps, found["note"] = 1, f"{row.note}; warmed up by one micro-batch, one step measured".lstrip("; ")
        times = []
        for _ in range(steps):
            synchronize(device)
            began = time.perf_counter()
            loss = row.step(ids, labels)
            synchronize(device)
            times.append((time.perf_counter() - began) * 1e3)
        seconds = statistics.median(times) / 1e3
        parts = operations.count(config, row.recipe, tokens, int((labels[:, 1:] != -100).sum()), ids.shape[1], len(ids))
        done = operations.total(parts)
        needed = operations.total(parts, lambda part: part.forward + part.backward)
        found |= {
            "ms": seconds * 1e3, "all_ms": times, "tokens_per_s": tokens / seconds, "loss": loss, "operations": done, "share": done / seconds / top,
            "floor_ms": done / top * 1e3, "not_recomputed": needed, "parts": {part.name: {"forward": part.forward, "recomputed": part.recomputed, "backward": part.backward} for part in parts},
        }
        if cuda:
            free, whole = torch.cuda.mem_get_info(device)
            found |= {"peak_gib": torch.cuda.max_memory_allocated(device) / 2**30, "in_use_gib": (whole - free) / 2**30}
        if profiled:
            try:
                found["profile"] = profile(row, ids[first], labels[first], name)
            except Exception as error:  # the figures are measured by now and stay
                found["note"] = f"{found['note']}; no profile: {explain(error)}".lstrip("; ")
        return found
    finally:
        row.close()


def profile(row: Row, ids: torch.Tensor, labels: torch.Tensor, name: str) -> dict:
    """Prints where a step's time goes, by part and by kernel, and returns the first: label -> {"gpu_ms", "cpu_ms"}."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if ids.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with Labels(row.parts) as labels_of, torch.profiler.profile(activities=activities) as recorded:
        row.step(ids, labels)
        synchronize(ids.device)
    events = recorded.key_averages()
    # A label is recorded twice: as a range of the CPU thread, whose device time is that of the kernels it launched, and once more on the device.
    ranges = {e.key: e for e in events if e.key in labels_of.names and e.device_type == torch.autograd.DeviceType.CPU}
    found = {key: {"gpu_ms": e.device_time_total / 1e3, "cpu_ms": e.cpu_time_total / 1e3} for key, e in sorted(ranges.items())}
    on_device = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU and not e.is_user_annotation]
    kernels = sum(e.self_device_time_total for e in on_device) / 1e3
    print(f"\n{name}, {ids.shape[0]} x {ids.shape[1]} tokens with the profiler on: kernels {kernels:.1f} ms in all")
    for key, value in found.items():
        print(f"  {key:28s} gpu {value['gpu_ms']:9.1f} ms   cpu {value['cpu_ms']:9.1f} ms")
    rest = kernels - sum(value["gpu_ms"] for key, value in found.items() if "/" not in key)
    print(f"  {'embeddings, head, optimizer':28s} gpu {rest:9.1f} ms")
    print(events.table(sort_by="self_device_time_total" if ids.is_cuda else "self_cpu_time_total", row_limit=18, max_name_column_width=60))
    return found


def explain(error: Exception) -> str:
    """Why a row could not run, in one line."""
    line = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {line.split('. GPU')[0].removeprefix('CUDA out of memory. ')}"
    if isinstance(error, ImportError):
        return f"a library is missing: {line}"
    if isinstance(error, NotImplementedError):
        return f"not there yet: {line}"
    if isinstance(error, DoesNotFit):
        return line
    return f"{type(error).__name__}: {line}"


def surroundings(device: torch.device, commit: str | None) -> dict:
    """GPU, versions and commit that the figures belong to."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    if commit is None:
        asked = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False)
        commit = asked.stdout.strip() or "unknown"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none (CPU)"
    return {"gpu": gpu, "cuda": torch.version.cuda, "versions": versions, "commit": commit}


def table(rows: list[dict]) -> str:
    """The rows, aligned; a row that could not run has its reason instead of figures."""
    columns = [
        ("row", lambda r: r["row"]), ("ms/step", lambda r: f"{r['ms']:,.0f}"), ("tokens/s", lambda r: f"{r['tokens_per_s']:,.0f}"),
        ("peak GiB", lambda r: f"{r['peak_gib']:.1f}" if "peak_gib" in r else "-"), ("in use", lambda r: f"{r['in_use_gib']:.1f}" if "in_use_gib" in r else "-"),
        ("PFLOP", lambda r: f"{r['operations'] / 1e15:.3f}"), ("floor ms", lambda r: f"{r['floor_ms']:,.0f}"), ("share", lambda r: f"{r['share']:.1%}"), ("note", lambda r: r["note"]),
    ]
    lines = [[title for title, _ in columns]]
    lines += [[row["row"], row["why"]] if "why" in row else [show(row) for _, show in columns] for row in rows]
    wide = [max((len(line[i]) for line in lines if len(line) == len(columns)), default=0) for i in range(len(columns))]
    wide[0] = max(len(line[0]) for line in lines)
    return "\n".join("  ".join(cell.ljust(wide[i]) if i == 0 else cell.rjust(wide[i]) if len(line) > 2 and i < len(columns) - 1 else cell for i, cell in enumerate(line)) for line in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", default="notebook,peft,ours", help="comma-separated: notebook, peft, peft-torch, ours")
    parser.add_argument("--layers", type=int, default=52, help="the first N of the model's 52 layers")
    parser.add_argument("--steps", type=int, default=3, help="measured steps, of which the median counts")
    parser.add_argument("--batch", type=int, default=8, help="documents in a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a document")
    parser.add_argument("--config", type=Path, help="a hub config.json to take widths and pattern from instead of the real ones")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="written after every row")
    parser.add_argument("--profile", default="", help="rows to profile after measuring, comma-separated, or all")
    parser.add_argument("--commit", help="what to write where git is not at hand")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: run this on a GPU, or check its code with --device cpu and a small --config")
    try:
        config = json.loads(options.config.read_text(encoding="utf-8")) if options.config else operations.sizes(options.layers)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    names = options.rows.split(",")
    for name in names:
        if not name.startswith("ours"):
            builder(name)  # a misspelt row is refused before the first one runs
    torch.manual_seed(0)
    ids, labels = batch(config, options.batch, options.length, device)
    report = surroundings(device, options.commit) | {"layers": len(config["hybrid_override_pattern"]), "batch": options.batch, "length": options.length, "trained": int((labels != -100).sum())}
    report["ceiling"] = ceiling(device)
    rows: list[dict] = []
    report["rows"] = rows
    print(f"{report['gpu']}, CUDA {report['cuda']}, commit {report['commit']}, " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    print(f"{report['layers']} layers, {options.batch} x {options.length} tokens, {report['trained']} trained; matrix ceiling {report['ceiling'] / 1e12:.0f} TFLOP/s", flush=True)
    broken = 0
    for name in names:
        try:
            rows.append(measure(name, config, device, ids, labels, options.steps, report["ceiling"], options.profile == "all" or name in options.profile.split(",")))
        except Exception as error:  # whatever stops one row must not cost the others
            rows.append({"row": name, "why": explain(error)})
            if not isinstance(error, torch.OutOfMemoryError | ImportError | NotImplementedError | DoesNotFit):
                broken += 1
                traceback.print_exc()
        gc.collect()  # a row that stopped while being built has left its modules in cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(table(rows[-1:]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n" + table(rows))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
