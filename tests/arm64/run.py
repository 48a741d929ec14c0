"""What can be checked of linux/arm64 without such a machine. `make arm64` runs it; docs/arm64.md has the
figures of one run.

    ANNIE_ARM64_BASE=python:3.11-slim-bookworm .venv/bin/python tests/arm64/run.py [unpack | imports |
    logits | images]...

1. unpack   every lock, unpacked for Python 3.12 on aarch64, as the local executor on a DGX Spark would (no
   emulation)
2. imports  the environments train and vllm for Python 3.11 on aarch64, unpacked here; torch and vLLM imported
   in an arm64 container
3. logits   one prompt through the checkpoint of recipes/tiny.yaml, here and in that container: at most 1e-3
   apart
4. images   the Dockerfiles of train (without its last layer) and vllm, built for linux/arm64 and not exported

2 to 4 need a Docker engine that runs linux/arm64 (by QEMU's user emulation, for example) and
ANNIE_ARM64_BASE, the tag of a Python 3.11 image for arm64. Stage base must be built, or
ANNIE_ARM64_CHECKPOINT name a checkpoint's folder.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from forge import recipe as recipes  # noqa: E402
from forge.executor.local import Local  # noqa: E402
from forge.image import pythons  # noqa: E402

HOME = Path(os.environ.get("ANNIE_HOME", REPO / ".annie")).absolute()
LOCKS = (
    "host.lock",
    "tests/requirements.lock",
    "images/uv.lock",
    "images/train/requirements.lock",
    "images/vllm/requirements.lock",
    "images/vllm/base.lock",
    "images/torch-aarch64.lock",
)
ENVIRONMENTS = {
    "train": "import torch, transformers, peft",
    "vllm": "import torch, vllm, vllm._C; from vllm import LLM",
}
# QEMU's processors with SVE end `import torch` with a segmentation fault (QEMU 7.2), and torch reads the
# processor's features from /proc/cpuinfo, which is x86-64's under emulation: without a file of aarch64's in
# its place the first operation ends in the same way.
CPU = "neoverse-n1"
EMULATED = [
    f"--env=QEMU_CPU={CPU}",
    f"--volume={REPO}/tests/arm64/cpuinfo:/proc/cpuinfo:ro",
    "--env=OMP_NUM_THREADS=1",
]
# without the import of torch, which part `imports` does with that file in its place
TARGETS = {"train": ["--target=packages"]}
DIFFERENCE = 1e-3  # largest allowed difference of two logits
TAG = "annie/arm64-check"


@dataclass(frozen=True)
class Row:
    what: str
    result: str
    gb: float | None
    seconds: float


class Failed(Exception):
    """A check that did not hold; the message says what was found and expected."""


def main(words: list[str]) -> int:
    parts = {"unpack": unpack, "imports": imports, "logits": logits, "images": images}
    if unknown := set(words) - set(parts):
        print(f"found {', '.join(sorted(unknown))}; expected any of {', '.join(parts)}")
        return 2
    rows: list[Row] = []
    try:
        for name in words or parts:
            for row in parts[name]():
                rows.append(row)
                print(f"  {row.what}: {row.result} ({row.seconds:.0f} s)", flush=True)
    except Failed as fault:
        print(f"failed: {fault}", file=sys.stderr)
        return 1
    finally:
        print(table(rows))
    return 0


def table(rows: list[Row]) -> str:
    lines = ["| check | result | GB | s |", "|---|---|---:|---:|"]
    return "\n".join(
        lines
        + [
            f"| {r.what} | {r.result} | {'' if r.gb is None else f'{r.gb:.2f}'} | {r.seconds:.0f} |"
            for r in rows
        ]
    )


def run(command: list[str], **options) -> str:
    """stdout of a command. Failed, with the end of what it wrote, if it does not exit with 0."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise Failed(
            f"{' '.join(command[:6])} ... ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
        )
    return done.stdout


def unpack():
    """Every lock into a folder of its own, for the Python and the machine that a DGX Spark has."""
    python = pythons(REPO / "images")["aarch64"]
    for lock in LOCKS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            packages, size = unpacked([lock], Path(folder), python, "aarch64-manylinux_2_39")
        yield Row(f"{lock}, Python {python}", f"{packages} packages unpack", size, time.monotonic() - began)


def unpacked(locks: list[str], folder: Path, python: str, uv_platform: str) -> tuple[int, float]:
    """Packages and GB of some locks, unpacked into `folder`. Failed where one of their libraries is of
    another machine.
    """
    for lock in locks:
        run(
            [
                sys.executable,
                "-m",
                "uv",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--require-hashes",
                "--only-binary=:all:",
                f"--python-platform={uv_platform}",
                f"--python-version={python}",
                f"--target={folder}",
                "-r",
                str(REPO / lock),
            ]
        )
    packages = len(list(folder.glob("*.dist-info")))
    foreign = [path.name for path in folder.rglob("*.so*") if not path.is_symlink() and not aarch64(path)]
    if not packages or foreign:
        raise Failed(
            f"{', '.join(locks)}: found {packages} packages, and libraries of another machine: {foreign[:5]};"
            " expected aarch64's alone"
        )
    return packages, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def aarch64(library: Path) -> bool:
    """Whether a file is no ELF file, or one for aarch64 (e_machine 183)."""
    with library.open("rb") as opened:
        head = opened.read(20)
    return head[:4] != b"\x7fELF" or head[18:20] == bytes([183, 0])


def base_image() -> str:
    """A tag of ANNIE_ARM64_BASE with what vLLM links against."""
    base = os.environ.get("ANNIE_ARM64_BASE")
    if not base:
        raise Failed("found no ANNIE_ARM64_BASE; expected the tag of a Python 3.11 image for linux/arm64")
    dockerfile = (
        f"FROM {base}\nRUN apt-get update -qq && apt-get install -y -qq --no-install-recommends libnuma1\n"
    )
    run(
        [
            "docker",
            "buildx",
            "build",
            "--load",
            "--platform=linux/arm64",
            "--provenance=false",
            f"--tag={TAG}",
            "-",
        ],
        input=dockerfile,
    )
    return TAG


def environment(name: str) -> tuple[Path, int, float]:
    """An environment's packages for Python 3.11 on aarch64 in a folder that later runs use again; their
    number and GB.
    """
    folder = HOME / "arm64" / name
    if name == "vllm":
        folder.mkdir(parents=True, exist_ok=True)
        runpy.run_path(str(REPO / "images/vllm/install.py"))["bind_lazily"](folder, "aarch64")
    packages, size = unpacked(
        [f"images/{name}/requirements.lock", "images/torch-aarch64.lock"],
        folder,
        "3.11",
        "aarch64-manylinux_2_31",
    )
    return folder, packages, size


def container(name: str, *options: str) -> list[str]:
    """`docker run` of an arm64 container with the environment `name`."""
    return [
        "docker",
        "run",
        "--rm",
        "--platform=linux/arm64",
        "--network=none",
        *EMULATED,
        f"--volume={HOME / 'arm64' / name}:/environment",
        "--env=PYTHONPATH=/annie:/environment",
        "--workdir=/annie",
        *options,
        TAG,
    ]


def imports():
    """What each environment is for, imported in an arm64 container."""
    base_image()
    for name, statements in ENVIRONMENTS.items():
        began = time.monotonic()
        _, packages, size = environment(name)
        yield Row(
            f"environment {name}, Python 3.11", f"{packages} packages unpack", size, time.monotonic() - began
        )
        began = time.monotonic()
        program = (
            f"import platform, site; site.addsitedir('/environment'); {statements}; print(f'torch"
            " {torch.__version__} on {platform.machine()}:', torch.ones(9, 9).mm(torch.ones(9,"
            " 9)).sum().item())"
        )
        said = run([*container(name), "python3", "-c", program]).strip().splitlines()[-1]
        yield Row(statements, said, None, time.monotonic() - began)


def images():
    """The Dockerfiles of the CPU images; train without its last layer, which imports what was installed."""
    base_image()
    for name in ENVIRONMENTS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as empty:
            run(
                [
                    "docker",
                    "buildx",
                    "build",
                    "--output=type=cacheonly",
                    "--platform=linux/arm64",
                    "--provenance=false",
                    f"--build-arg=BASE={os.environ['ANNIE_ARM64_BASE']}",
                    "--build-arg=TORCH=cpu",
                    "--build-arg=BYTECODE=0",
                    f"--build-context=wheels={empty}",
                    *TARGETS.get(name, []),
                    f"--file={REPO / 'images' / name / 'Dockerfile'}",
                    str(REPO / "images"),
                ]
            )
        yield Row(f"images/{name}/Dockerfile", "builds", None, time.monotonic() - began)


def logits():
    """The same prompt through the same checkpoint on both machines. The arm64 container runs the code of
    this repository.
    """
    base_image()
    environment("train")
    local = Local(REPO, HOME)
    image = recipes.load(REPO / "recipes/tiny.yaml", REPO).images["train"]
    local.prepare(image, lambda line: print(f"  {line}", flush=True))
    python = str(local.python(image))
    checkpoint = (
        os.environ.get("ANNIE_ARM64_CHECKPOINT")
        or run(
            [sys.executable, "build.py", "path", "base", "--recipe", "tiny", "--executor", "local"], cwd=REPO
        ).strip()
    )
    with tempfile.TemporaryDirectory() as folder:
        here, there = Path(folder, "x86_64.npy"), Path(folder, "arm64", "aarch64.npy")
        there.parent.mkdir()
        program = "tests/arm64/logits.py"
        began = time.monotonic()
        said = run(
            [python, program, "compute", checkpoint, str(here)],
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(REPO)},
        )
        yield Row("logits here", said.strip(), None, time.monotonic() - began)
        began = time.monotonic()
        said = run(
            [
                *container(
                    "train",
                    f"--volume={REPO}/model:/annie/model:ro",
                    f"--volume={REPO}/tests/arm64:/annie/tests/arm64:ro",
                    f"--volume={Path(checkpoint).resolve()}:/checkpoint:ro",
                    f"--volume={there.parent}:/output",
                ),
                "python3",
                program,
                "compute",
                "/checkpoint",
                f"/output/{there.name}",
            ]
        )
        yield Row(
            "logits in the arm64 container", said.strip().splitlines()[-1], None, time.monotonic() - began
        )
        result = json.loads(run([python, program, "compare", str(here), str(there)], cwd=REPO))
    if result["difference"] > DIFFERENCE or len(set(result["tokens"])) > 1:
        raise Failed(
            f"logits: found {result}; expected at most {DIFFERENCE} of difference and the same first token"
        )
    yield Row(
        "difference of the logits",
        f"{result['difference']:.1e} of up to {result['largest']:.1f}, {result['shape']}; first token"
        f" {result['tokens'][0]} on both",
        None,
        0,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
