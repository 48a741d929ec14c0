"""The locks: exact, hashed, and installable where the recipes want them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
LOCKS = sorted([*REPO.glob("*.lock"), *REPO.glob("images/**/*.lock"), *REPO.glob("tests/*.lock")])


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: str(path.relative_to(REPO)))
def test_every_package_is_pinned_and_hashed(lock):
    packages = re.split(r"\n(?=[a-zA-Z])", "\n" + "".join(line for line in lock.open() if not line.startswith("#")))
    for package in filter(str.strip, packages):
        assert re.match(r"\S+==\S+ .*\\\n", package.strip() + "\n") and "--hash=sha256:" in package, package.splitlines()[0]


@pytest.mark.parametrize("lock", ["images/train/requirements.lock", "images/train/kernels.lock", "images/vllm/base.lock", "images/uv.lock"])
def test_a_dgx_spark_finds_a_wheel_of_every_package(lock, tmp_path):
    """What is added to the NGC images: aarch64, Python 3.12, no compiler. uv resolves and downloads nothing."""
    platform = ["--python-platform=aarch64-manylinux_2_39", "--python-version=3.12", "--only-binary=:all:"]
    if "kernels" in lock:  # mamba-ssm has no wheel; its source becomes a pure one
        lock_without = tmp_path / "kernels.lock"
        lock_without.write_text(re.sub(r"mamba-ssm==(.*\\\n)+.*", "", (REPO / lock).read_text()))
        lock = lock_without
    done = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--no-deps", "--require-hashes", *platform, f"--target={tmp_path}", "-r", str(REPO / lock)],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Would install" in done.stderr
