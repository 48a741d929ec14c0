"""Runs every test in the environment it belongs to, and closes with one summary line.

    .venv/bin/python tests/run.py [FOLDER or FILE ...] [-- pytest arguments]

Host tests run in `.venv`; the tests of a stage or of the model run in that stage's own environment (made
from its locked requirements if it is not there yet); whole-line tests drive `build.py` from the host.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

# First match wins; the order is the order of the runs: quick rooms first, whole lines last.
ROOMS = [
    ("host", "host", ["tests/forge", "tests/product"]),
    ("model", "train", ["tests/model", "tests/stages", "tests/bench"]),
    ("serving", "vllm", ["tests/vllm"]),
    ("line", "host", ["tests/line"]),
]
# Tests that share nothing but the CPU run in two processes, a file at a time.
IN_PROCESSES = ("model",)
PROCESSES = ["-n", "2", "--dist", "loadfile"]
# Threads that wait would else take turns of the CPU from the other process.
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}


def interpreter(environment: str) -> tuple[list[str], dict[str, str]]:
    """The command and the variables that run pytest in `environment`."""
    if environment == "host":
        return [sys.executable], {}
    python = prepared(environment)
    variables = {"PYTHONPATH": os.pathsep.join([str(REPO), str(pytest_folder(python))])}
    if environment == "vllm":  # one test there compares what stage data makes with what vLLM does
        variables["ANNIE_TEST_TRAIN_PYTHON"] = interpreter("train")[0][0]
    return [str(python)], variables


def prepared(environment: str) -> Path:
    """The Python of a stage's environment, which is made if it is not there yet."""
    from forge.executor import local
    from forge.recipe import load

    executor = local.Local(REPO, Path(os.environ.get("ANNIE_HOME", REPO / ".annie")))
    image = load(REPO / "recipes" / "tiny.yaml", REPO).images[environment]
    executor.prepare(image, lambda line: print(f"  {line}", flush=True))
    return executor.python(image)


def pytest_folder(python: Path) -> Path:
    """pytest for a stage's environment, beside it and not in it, so that tests see what the stage sees."""
    version = python.resolve().name
    lock = REPO / "tests" / "requirements.lock"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]
    folder = Path(os.environ.get("ANNIE_HOME", REPO / ".annie")) / "envs" / f"pytest-{version}-{digest}"
    if not (folder / "ready").exists():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "uv",
                "pip",
                "install",
                "--quiet",
                "--python",
                str(python),
                "--target",
                str(folder),
                "--require-hashes",
                "-r",
                str(lock),
            ],
            check=True,
        )
        (folder / "ready").touch()
    return folder


def chosen(paths: list[str], wanted: list[str]) -> list[str]:
    """The part of a room's `paths` that was asked for; all of it when nothing was."""
    if not wanted:
        return paths
    return [
        w for w in wanted if any(Path(w.split("::")[0]).resolve().is_relative_to(REPO / p) for p in paths)
    ]


def main() -> int:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    wanted, extra = arguments[:split], arguments[split + 1 :]
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    broken = []
    for room, environment, paths in ROOMS:
        paths = [p for p in chosen(paths, wanted) if (REPO / p.split("::")[0]).exists()]
        if not paths:
            continue
        print(f"\n== {room}: {' '.join(paths)} in the {environment} environment", flush=True)
        command, variables = interpreter(environment)
        variables |= PATIENT if room in IN_PROCESSES else {}
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            code = subprocess.run(
                [
                    *command,
                    "-m",
                    "pytest",
                    "-q",
                    "-rs",
                    "-p",
                    "no:cacheprovider",
                    f"--junitxml={report}",
                    *(PROCESSES if room in IN_PROCESSES else ()),
                    *paths,
                    *extra,
                ],
                cwd=REPO,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **variables},
            ).returncode
            suites = ElementTree.parse(report).getroot().iter("testsuite") if report.exists() else []
            for suite in suites:
                failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
                skipped = int(suite.get("skipped", 0))
                counts["failed"] += failed
                counts["skipped"] += skipped
                counts["passed"] += int(suite.get("tests", 0)) - failed - skipped
        if code != 0:
            broken.append(room)
    if broken:
        print(f"\nnot green: {', '.join(broken)}")
    if broken and not counts["failed"]:
        counts["failed"] = len(broken)  # a run that broke before its first test is a failure too
    print(f"\n{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return 1 if broken or not counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
