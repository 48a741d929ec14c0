"""Measures training steps on one GPU as users run them: conversations of changing lengths, and other ways of
training beside ours.

    python -m bench.train_step --rows ours --lengths equal,mixed,voice,voice-packed --steps 60
    python -m bench.train_step --rows ours,peft,peft-torch,notebook --lengths mixed --steps 4

Rows: `ours` (NF4, all targets, as in stage train), or `ours-FORM-TARGETS` such as ours-nvfp4-attention;
`peft` (transformers and PEFT with the Mamba kernels they find), `peft-torch` (the same without), `notebook`
(the lab notebook's recipe). Lengths are those of bench/lengths.py, the same for every row. Weights are
random. Every row is a process of its own. Its first s is the time from the process's start to the end of the
first step, including CUDA graphs and tuning. Steps after the third are timed; of at most three, those after
the first. Compiled is the number of Triton compilations after the third step. Peak is memory allocated, held
is memory that torch reserved, including graphs. With ANNIE_KERNELS=FOLDER compiled kernels stay there, as in
the stages, and the next process starts warm. A row that cannot run shows the reason in its line, and the
bench continues.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stages.train import start

start.before_torch(lambda message, remedy: print(message, remedy, file=sys.stderr))

import torch  # noqa: E402

from bench import figures, lengths, operations  # noqa: E402
from bench.labels import Labels  # noqa: E402
from bench.row import DoesNotFit, Row, synchronize  # noqa: E402
from model.layers import determinism, grouped  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "mamba-ssm")


def builder(
    name: str, graphs: bool = True, decoded: float = 0.0
) -> Callable[[dict[str, Any], torch.device], Row]:
    """(config, device) -> Row for a row's name. Libraries are imported here, so that a missing one affects
    one row only.
    """
    if name.startswith("ours"):
        from bench.ours import ours

        form, _, targets = name.removeprefix("ours").removeprefix("-").partition("-")
        return lambda config, device: ours(config, device, form or "nf4", targets or "all", graphs, decoded)
    from bench import baselines

    known = {
        "notebook": baselines.notebook,
        "peft": baselines.peft_today,
        "peft-torch": lambda config, device: baselines.peft_today(config, device, scan="torch"),
    }
    if name not in known:
        raise SystemExit(f"--rows {name}: there are {', '.join([*known, 'ours'])}")
    return known[name]


def ceiling(device: torch.device) -> float:
    """Operations per second of a large BF16 product of random matrices: 8192 cubed; 512 on a CPU, where the
    number has no use.
    """
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


def measure(
    name: str, config: dict[str, Any], device: torch.device, top: float, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Builds one row, runs it on each distribution of lengths, yields the figures of each, and frees the row.

    `top` is the matrix ceiling in operations per second. Times are in s or ms as their names say, memory in
    GB (10^9 bytes).
    """
    cuda = device.type == "cuda"
    compilations = figures.Compilations() if cuda else None
    began = time.perf_counter()
    row = builder(name, not options.eager, 1e9 * options.decoded_gb)(config, device)
    try:
        synchronize(device)
        built = {"build_s": time.perf_counter() - began}
        print(f"{name}: built in {built['build_s']:.1f} s, the import of its libraries included", flush=True)
        if cuda:
            built |= {"build_peak_gb": torch.cuda.max_memory_allocated(device) / 1e9}
        for number, kind in enumerate(lengths.kinds(options.lengths)):
            if row.pads:
                row.micro = options.micro_batch[number % len(options.micro_batch)]
            row_figures: dict[str, Any] = {"row": name, "lengths": kind, "ceiling": top}
            try:
                row_figures |= run(
                    row,
                    lengths.plan(kind, options.steps, options.documents),
                    config,
                    device,
                    top,
                    compilations,
                )
                if number == 0:
                    row_figures |= built
                else:
                    del row_figures["first_s"]  # of this process, the first was on other lengths
            except Exception as error:  # what stops one distribution must not cost the others
                row_figures |= failed(error)
                row.optimizer.zero_grad(set_to_none=True)
            else:
                if name in options.profile.split(",") or options.profile == "all":
                    row_figures |= profiled(
                        row, lengths.plan(kind, 1, options.documents)[0], config, name, row_figures["note"]
                    )
            yield row_figures
    finally:
        row.close()


def run(
    row: Row,
    plan: list[tuple[int, ...]],
    config: dict[str, Any],
    device: torch.device,
    top: float,
    compilations: figures.Compilations | None,
) -> dict[str, Any]:
    """The figures of a row's steps on conversations with the lengths of `plan`."""
    cuda, times, step_operations, first, began = device.type == "cuda", [], [], None, time.perf_counter()
    row.prepare(plan)
    synchronize(device)
    prepared = time.perf_counter() - began
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    for number, step_lengths in enumerate(plan):
        step = lengths.conversations(step_lengths, config["vocab_size"], number, device)
        synchronize(device)
        began = time.perf_counter()
        loss = row.step(step)
        synchronize(device)
        times.append(time.perf_counter() - began)
        first = first or time.time() - figures.started()
        if compilations:
            compilations.step(number)
        computed, trained = row.computed(step_lengths), sum(conversation.trained for conversation in step)
        tokens = sum(computed)
        step_operations.append(
            operations.total(
                operations.count(
                    config,
                    row.workload,
                    tokens,
                    trained,
                    sum(n * n for n in computed) / tokens,
                    row.passes(step_lengths),
                )
            )
        )
    timed = figures.counted(len(plan))
    measured: dict[str, Any] = {"first_s": first, "prepare_s": prepared, "loss": loss, "note": row.described}
    measured |= figures.summary(
        times,
        [sum(step_lengths) for step_lengths in plan],
        [sum(row.computed(step_lengths)) for step_lengths in plan],
    )
    measured |= {
        "operations": sum(step_operations[timed]) / measured["timed"],
        "share": sum(step_operations[timed]) / sum(times[timed]) / top,
    }
    if compilations and compilations.after is not None:
        measured["compiled"] = compilations.after
    if cuda:
        measured |= {
            "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9,
            "held_gb": torch.cuda.max_memory_reserved(device) / 1e9,
        }
    return measured


def profiled(row: Row, plan: tuple[int, ...], config: dict[str, Any], name: str, note: str) -> dict[str, Any]:
    """The result of `profile`, or its error in the note, because the figures are already measured and stay
    valid.
    """
    try:
        return {"profile": profile(row, plan, config, name)}
    except Exception as error:
        return {"note": f"{note}; no profile: {explain(error)}"}


def profile(row: Row, plan: tuple[int, ...], config: dict[str, Any], name: str) -> dict[str, Any]:
    """Prints a step's time by part and by kernel, and returns the parts: label -> {"gpu_ms", "cpu_ms"}.

    A step that replays CUDA graphs runs no module, so it has kernels only.
    """
    step = lengths.conversations(plan, config["vocab_size"], 0, row.device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if row.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with Labels(row.parts) as labels_of, torch.profiler.profile(activities=activities) as recorded:
        row.step(step)
        synchronize(row.device)
    events = recorded.key_averages()
    # A label is recorded twice: as a range of the CPU thread, whose device time is that of the kernels it
    # launched, and once more on the device.
    ranges = {
        e.key: e
        for e in events
        if e.key in labels_of.names and e.device_type == torch.autograd.DeviceType.CPU
    }
    times_of_label = {
        key: {"gpu_ms": e.device_time_total / 1e3, "cpu_ms": e.cpu_time_total / 1e3}
        for key, e in sorted(ranges.items())
    }
    on_device = [
        e for e in events if e.device_type != torch.autograd.DeviceType.CPU and not e.is_user_annotation
    ]
    kernels = sum(e.self_device_time_total for e in on_device) / 1e3
    print(
        f"\n{name}, {len(plan)} conversations of {sum(plan)} tokens with the profiler on: kernels"
        f" {kernels:.1f} ms in all"
    )
    for key, value in times_of_label.items():
        print(f"  {key:28s} gpu {value['gpu_ms']:9.1f} ms   cpu {value['cpu_ms']:9.1f} ms")
    rest = kernels - sum(value["gpu_ms"] for key, value in times_of_label.items() if "/" not in key)
    print(f"  {'embeddings, head, optimizer':28s} gpu {rest:9.1f} ms")
    print(
        events.table(
            sort_by="self_device_time_total" if row.device.type == "cuda" else "self_cpu_time_total",
            row_limit=18,
            max_name_column_width=60,
        )
    )
    return times_of_label


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


def failed(error: Exception) -> dict[str, Any]:
    """The fields that replace a row's figures. `broken` is True for an error that is not a limit of the
    machine.
    """
    limit = isinstance(error, torch.OutOfMemoryError | ImportError | NotImplementedError | DoesNotFit)
    if not limit:
        traceback.print_exception(error)
    return {"why": explain(error), "broken": not limit}


def surroundings(device: torch.device, commit: str | None) -> dict[str, Any]:
    """GPU, versions and commit of the measurement."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    if commit is None:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=False,
        )
        commit = described.stdout.strip() or "unknown"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none (CPU)"
    return {"gpu": gpu, "cuda": torch.version.cuda, "versions": versions, "commit": commit}


def alone(name: str, arguments: list[str]) -> dict[str, Any]:
    """The report of one way of training, measured in a separate process."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        ended = subprocess.run(
            [sys.executable, "-m", "bench.train_step", *arguments, "--rows", name, "--json", str(path)],
            check=False,
        )
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    if ended.returncode not in (0, 1):
        report["rows"].append(
            {
                "row": name,
                "lengths": "",
                "why": f"its process ended with {ended.returncode} before it had measured everything",
                "broken": True,
            }
        )
    return report


def here(
    name: str, config: dict[str, Any], device: torch.device, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The same report, measured in this process; yields it after every distribution of lengths."""
    report = surroundings(device, options.commit) | {
        "layers": len(config["hybrid_override_pattern"]),
        "documents": options.documents,
    }
    imported = time.time() - figures.started()
    print(
        f"{report['gpu']}, CUDA {report['cuda']}, commit {report['commit']}, "
        + ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    )
    top, rows = ceiling(device), []
    ready = time.time() - figures.started()
    print(
        f"{name}: {report['layers']} layers; matrix ceiling {top / 1e12:.0f} TFLOP/s; torch loaded"
        f" {imported:.1f} s after the start, the ceiling measured after {ready:.1f} s",
        flush=True,
    )
    try:
        for row in measure(name, config, device, top, options):
            rows.append(row)
            print(figures.table([row]), flush=True)
            yield report | {"rows": rows}
    except Exception as error:  # it could not be built
        yield report | {"rows": [*rows, {"row": name, "lengths": "", **failed(error)}]}


def micro_batches(text: str, kinds: int) -> list[int]:
    """The sizes of micro-batches. Raises ValueError unless there is one, or one for each distribution."""
    sizes = [int(part) if part.isdigit() else 0 for part in text.split(",")]
    if min(sizes) < 1 or len(sizes) not in (1, kinds):
        raise ValueError(
            f"--micro-batch {text}: expected a number from 1 on, or one for each of the {kinds} --lengths"
        )
    return sizes


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", default="ours", help="comma-separated: notebook, peft, peft-torch, ours")
    parser.add_argument("--lengths", default="equal", help=f"comma-separated: {', '.join(lengths.KINDS)}")
    parser.add_argument("--steps", type=int, default=3, help="steps of each row on each distribution")
    parser.add_argument(
        "--documents",
        type=int,
        default=lengths.DOCUMENTS,
        help="conversations of a step (voice-packed has as many as fit)",
    )
    parser.add_argument(
        "--micro-batch",
        default="1",
        help=(
            "conversations that peft and peft-torch pad to one length and compute together: one number, or"
            " one for each of --lengths"
        ),
    )
    parser.add_argument("--layers", type=int, default=52, help="the first N of the model's 52 layers")
    parser.add_argument(
        "--tiles",
        action="store_true",
        help=(
            "ours: our grouped products in place of torch's, as every GPU but Hopper and data-centre"
            " Blackwell takes them"
        ),
    )
    parser.add_argument("--eager", action="store_true", help="ours: without CUDA graphs")
    parser.add_argument("--decoded-gb", type=float, default=0.0, help="ours: as stage train's decoded_gb")
    parser.add_argument(
        "--deterministic", action="store_true", help="ours: as stage train with deterministic: true"
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="a hub config.json to take widths and pattern from instead of the real ones",
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="written after every row")
    parser.add_argument(
        "--profile", default="", help="rows to profile after measuring, comma-separated, or all"
    )
    parser.add_argument("--commit", help="what to write where git is not at hand")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device: run this on a GPU, or check its code with --device cpu and a small --config"
        )
    try:
        config = (
            json.loads(options.config.read_text(encoding="utf-8"))
            if options.config
            else operations.sizes(options.layers)
        )
        options.micro_batch = micro_batches(options.micro_batch, len(lengths.kinds(options.lengths)))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if low := [name for name in ("steps", "documents") if getattr(options, name) < 1]:
        raise SystemExit(f"--{low[0]} {getattr(options, low[0])}: expected 1 or more")
    names = options.rows.split(",")
    for name in names:
        if not name.startswith("ours"):
            builder(name)  # a misspelt row is refused before the first one runs
    if options.deterministic and len(names) == 1 and names[0].startswith("ours"):
        determinism.before_torch()
        determinism.enable()
    if options.tiles:
        grouped.TORCH_KERNELS = ()
    torch.manual_seed(0)
    # Several rows: this process asks the GPU for nothing, so that all of its memory is the row's.
    reports = (
        here(names[0], config, device, options)
        if len(names) == 1
        else (alone(name, arguments) for name in names)
    )
    rows: list[dict[str, Any]] = []
    for report in reports:
        rows = report["rows"] if len(names) == 1 else [*rows, *report["rows"]]
        if options.json:
            options.json.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print("\n" + figures.table(rows))
    return 1 if any(row.get("broken") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
