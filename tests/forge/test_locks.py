"""The locks: exact, hashed, and installable where the recipes want them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from forge.image import pythons

REPO = Path(__file__).resolve().parents[2]
LOCKS = sorted([*REPO.glob("*.lock"), *REPO.glob("images/**/*.lock"), *REPO.glob("tests/*.lock")])


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: str(path.relative_to(REPO)))
def test_every_package_is_pinned_and_hashed(lock):
    packages = re.split(
        r"\n(?=[a-zA-Z])", "\n" + "".join(line for line in lock.open() if not line.startswith("#"))
    )
    for package in filter(str.strip, packages):
        assert re.match(r"\S+==\S+ .*\\\n", package.strip() + "\n") and "--hash=sha256:" in package, (
            package.splitlines()[0]
        )


IMAGES = REPO / "images"
X86_64, AARCH64 = "x86_64-manylinux_2_28", "aarch64-manylinux_2_28"
HOST = [
    (lock, python, platform)
    for lock in ("host.lock", "tests/requirements.lock")
    for python in ("3.11", "3.12", "3.13", "3.14")
    for platform in (X86_64, AARCH64)
]
# A DGX Spark: what is added to the NGC images (their Python is 3.12), and the local executor's environments
# on DGX OS (3.12 too).
SPARK = [
    (lock, "3.12", "aarch64-manylinux_2_39")
    for lock in (
        "images/train/requirements.lock",
        "images/train/kernels.lock",
        "images/vllm/base.lock",
        "images/uv.lock",
        "images/vllm/requirements.lock",
        "images/torch-aarch64.lock",
    )
]
# The images with `torch: cpu`, whose base is Debian 12 with Python 3.11, and the environments on x86-64.
# llguidance wants glibc 2.31.
SLIM = [
    (f"images/{lock}.lock", "3.11", f"{machine}-manylinux_2_31")
    for lock in ("uv", "train/requirements", "vllm/requirements")
    for machine in ("x86_64", "aarch64")
]
# torch-x86_64.lock: uv asks another index, or a folder of wheels
SLIM += [("images/torch-aarch64.lock", "3.11", AARCH64)]


@pytest.mark.parametrize("lock, python, platform", HOST + SPARK + SLIM)
def test_every_package_has_a_wheel_where_it_is_to_be_installed(lock, python, platform, tmp_path):
    """No compiler is needed anywhere. uv resolves and downloads nothing."""
    options = [f"--python-platform={platform}", f"--python-version={python}", "--only-binary=:all:"]
    if "kernels" in lock:  # mamba-ssm has no wheel; its source becomes a pure one
        lock_without = tmp_path / "kernels.lock"
        lock_without.write_text(re.sub(r"mamba-ssm==(.*\\\n)+.*", "", (REPO / lock).read_text()))
        lock = lock_without
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "install",
            "--dry-run",
            "--no-deps",
            "--require-hashes",
            *options,
            f"--target={tmp_path}",
            "-r",
            str(REPO / lock),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Would install" in done.stderr


def test_every_machine_has_a_torch_lock_and_a_python():
    machines = pythons(IMAGES)
    assert machines == {"x86_64": "3.11", "aarch64": "3.12"}
    assert {f"torch-{machine}.lock" for machine in machines} == {
        path.name for path in IMAGES.glob("torch-*.lock")
    }


def test_the_torch_locks_hold_the_same_torch():
    versions = {
        re.search(r"^torch==([\d.]+)", path.read_text(), re.MULTILINE)[1]
        for path in IMAGES.glob("torch-*.lock")
    }
    assert len(versions) == 1
