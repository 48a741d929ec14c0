"""The small line with torch held to fewer instructions than this CPU has: other sums, the same manners.
Part of `make long`.

vLLM chooses its own kernels by the CPU alone, so its half of the line is the same each time.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import BUILD, HOME, ran

LINE = ("--recipe", "tiny", "--executor", "local")
CPUS = {
    "SSE": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
AVX512 = "avx512f" in Path("/proc/cpuinfo").read_text()

pytestmark = pytest.mark.skipif(
    os.environ.get("ANNIE_TEST_LONG") != "1", reason="ten minutes each: make long"
)


@pytest.mark.parametrize("cpu", CPUS)
def test_the_tuned_model_passes_on_another_cpu(cpu, tmp_path, monkeypatch):
    if cpu == "AVX2" and not AVX512:
        pytest.skip("not run: this CPU has no more than AVX2")
    for name, value in CPUS[cpu].items():
        monkeypatch.setenv(name, value)
    (tmp_path / "envs").symlink_to(HOME / "envs")
    ran(*BUILD, "run", *LINE, home=tmp_path)
    report = json.loads(
        Path(ran(*BUILD, "path", "evaluate", *LINE, home=tmp_path).strip(), "report.json").read_text()
    )
    print(cpu, report["pass"])
    assert report["pass"]["tuned"] >= 0.9 and report["pass"]["base"] < 0.3 and report["gate"]["passed"]
