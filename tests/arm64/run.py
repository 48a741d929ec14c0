"""What can be checked of linux/arm64 without such a machine. `make arm64` runs it; docs/arm64.md has the figures of one run.

    ANNIE_ARM64_BASE=python:3.11-slim-bookworm .venv/bin/python tests/arm64/run.py [unpack | images | logits]...

1. unpack   every lock, unpacked for Python 3.12 on aarch64, as the local executor on a DGX Spark would (no emulation)
2. images   the images train and vllm, built for linux/arm64; torch and vLLM imported in them
3. logits   one prompt through the checkpoint of recipes/tiny.yaml, here and in the arm64 container: at most 1e-3 apart

2 and 3 need a Docker engine that runs linux/arm64 (by QEMU's user emulation, for example) and ANNIE_ARM64_BASE, the tag of a
Python 3.11 image for arm64. Stage base must be built, or ANNIE_ARM64_CHECKPOINT name a checkpoint's folder.
"""

from __future__ import annotations

import json
import os
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

LOCKS = ("host.lock", "tests/requirements.lock", "images/uv.lock", "images/train/requirements.lock", "images/vllm/requirements.lock",
         "images/vllm/base.lock", "images/torch-aarch64.lock")
IMAGES = {"train": "import torch, transformers, peft, bitsandbytes; torch.ones(2, 2) @ torch.ones(2, 2)",
          "vllm": "import torch, vllm, vllm._C, annie_vllm_cpu; from vllm import LLM, SamplingParams"}
DIFFERENCE = 1e-3  # largest allowed difference of two logits
TAG = "annie/arm64-check-{}"


@dataclass(frozen=True)
class Row:
    what: str
    result: str
    gb: float | None
    seconds: float


class Failed(Exception):
    """A check that did not hold; the message says what was found and expected."""


def main(words: list[str]) -> int:
    parts = {"unpack": unpack, "images": images, "logits": logits}
    if unknown := set(words) - set(parts):
        print(f"found {', '.join(sorted(unknown))}; expected any of {', '.join(parts)}")
        return 2
    rows: list[Row] = []
    try:
        for name in words or parts:
            for row in parts[name]():
                rows.append(row)
                print(f"  {row}", flush=True)
    except Failed as fault:
        print(f"failed: {fault}", file=sys.stderr)
        return 1
    finally:
        print(table(rows))
    return 0


def table(rows: list[Row]) -> str:
    lines = ["| check | result | GB | s |", "|---|---|---:|---:|"]
    return "\n".join(lines + [f"| {r.what} | {r.result} | {'' if r.gb is None else f'{r.gb:.2f}'} | {r.seconds:.0f} |" for r in rows])


def run(command: list[str], **options) -> str:
    """stdout of a command. Failed, with the end of what it wrote, if it does not exit with 0."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise Failed(f"{' '.join(command[:6])} ... ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def unpack():
    """Every lock into a folder of its own, for the Python and the machine that a DGX Spark has."""
    python = pythons(REPO / "images")["aarch64"]
    for lock in LOCKS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            run([sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:", "--link-mode=copy",
                 "--python-platform=aarch64-manylinux_2_39", f"--python-version={python}", f"--target={folder}", "-r", str(REPO / lock)])
            packages = len(list(Path(folder).glob("*.dist-info")))
            foreign = [path.name for path in Path(folder).rglob("*.so*") if not path.is_symlink() and not aarch64(path)]
            if not packages or foreign:
                raise Failed(f"{lock}: found {packages} packages, and libraries of another machine: {foreign[:5]}; expected aarch64's alone")
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e9
        yield Row(f"{lock}, Python {python}", f"{packages} packages unpack", size, time.monotonic() - began)


def aarch64(library: Path) -> bool:
    """Whether a file is no ELF file, or one for aarch64 (e_machine 183)."""
    with library.open("rb") as opened:
        head = opened.read(20)
    return head[:4] != b"\x7fELF" or head[18:20] == bytes([183, 0])


def images():
    """The Dockerfiles of the CPU images, built for linux/arm64, and their main packages imported."""
    base = os.environ.get("ANNIE_ARM64_BASE")
    if not base:
        raise Failed("found no ANNIE_ARM64_BASE; expected the tag of a Python 3.11 image for linux/arm64")
    for name, imports in IMAGES.items():
        began, tag = time.monotonic(), TAG.format(name)
        with tempfile.TemporaryDirectory() as empty:
            run(["docker", "buildx", "build", "--load", "--platform=linux/arm64", "--provenance=false", f"--build-arg=BASE={base}",
                 "--build-arg=TORCH=cpu", "--build-arg=BYTECODE=0", f"--build-context=wheels={empty}", f"--tag={tag}",
                 f"--file={REPO / 'images' / name / 'Dockerfile'}", str(REPO / "images")])
        size = int(run(["docker", "image", "inspect", "--format={{.Size}}", tag])) / 1e9
        yield Row(f"image {name}", "builds", size, time.monotonic() - began)
        began = time.monotonic()
        said = run([*container(name), "python3", "-c", f"import platform; {imports}; print('torch', torch.__version__, 'on', platform.machine())"])
        yield Row(f"image {name}: imports", said.strip().splitlines()[-1], None, time.monotonic() - began)


def container(name: str, *options: str) -> list[str]:
    return ["docker", "run", "--rm", "--platform=linux/arm64", "--network=none", *options, TAG.format(name)]


def logits():
    """The same prompt through the same checkpoint on both machines. The arm64 container runs the code of this repository."""
    local = Local(REPO, Path(os.environ.get("ANNIE_HOME", REPO / ".annie")))
    image = recipes.load(REPO / "recipes/tiny.yaml", REPO).images["train"]
    local.prepare(image, lambda line: print(f"  {line}", flush=True))
    python = str(local.python(image))
    checkpoint = os.environ.get("ANNIE_ARM64_CHECKPOINT") or run(
        [sys.executable, "build.py", "path", "base", "--recipe", "tiny", "--executor", "local"], cwd=REPO).strip()
    with tempfile.TemporaryDirectory() as folder:
        here, there = Path(folder, "x86_64.npy"), Path(folder, "arm64", "aarch64.npy")
        there.parent.mkdir()
        program = "tests/arm64/logits.py"
        began = time.monotonic()
        said = run([python, program, "compute", checkpoint, str(here)], cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)})
        yield Row("logits here", said.strip(), None, time.monotonic() - began)
        began = time.monotonic()
        said = run([*container(
            "train", f"--volume={REPO}/nemotron:/annie/nemotron:ro", f"--volume={REPO}/tests/arm64:/annie/tests/arm64:ro", "--env=PYTHONPATH=/annie",
            f"--volume={Path(checkpoint).resolve()}:/checkpoint:ro", f"--volume={there.parent}:/output"), "python3", program, "compute", "/checkpoint", f"/output/{there.name}"])
        yield Row("logits in the arm64 container", said.strip().splitlines()[-1], None, time.monotonic() - began)
        result = json.loads(run([python, program, "compare", str(here), str(there)], cwd=REPO))
    if result["difference"] > DIFFERENCE or len(set(result["tokens"])) > 1:
        raise Failed(f"logits: found {result}; expected at most {DIFFERENCE} of difference and the same first token")
    yield Row("difference of the logits", f"{result['difference']:.1e} of up to {result['largest']:.1f}, {result['shape']}; first token {result['tokens'][0]} on both", None, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
