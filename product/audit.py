"""The audit of a checkpoint folder, run where the model's code runs: in the image of stage quantize."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from forge import artifact_types, contract
from forge.executor import Executor
from forge.finding import Finding, Refused, error
from forge.plan import Context
from forge.program import Program
from product import QUANTIZE

MODULE = "audit"


def audit(
    context: Context, executor: Executor, folder: Path, base: Path | None = None, vllm: str | None = None
) -> dict[str, Any]:
    """`facts`, `serve` and `findings` of docs/formats.md. Refused if a folder holds no checkpoint, or the
    audit itself cannot run.
    """
    folders = {"FOLDER": folder} | ({"--base": base} if base else {})
    if missing := [finding for name, path in folders.items() for finding in _no_checkpoint(name, path)]:
        raise Refused(missing)
    types = artifact_types.load(context.repo / "stages")
    environment = context.recipe.images[contract.load(context.repo / "stages" / QUANTIZE, types).image]
    program = Program(QUANTIZE, environment, context.repo, MODULE)
    if lacking := [f for f in executor.check([environment], gpu=False) if f.level == "error"]:
        raise Refused(lacking)
    executor.prepare(environment, lambda line: print(line, file=sys.stderr))
    executor.bake(program, lambda line: print(line, file=sys.stderr))
    arguments: list[str | Path] = [folder.absolute()]
    arguments += ["--base", base.absolute()] if base else []
    arguments += [f"--vllm={vllm}"] if vllm is not None else []
    done = subprocess.run(
        executor.command(program, arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer
    except ValueError as fault:
        said = " | ".join(done.stderr.strip().splitlines()[-3:]) or "nothing"
        found = f"exit status {done.returncode} and no audit; it said: {said}"
        raise Refused(
            error("audit", found, "the audit as JSON", "It is a fault of the audit or of its image.")
        ) from fault


def _no_checkpoint(name: str, folder: Path) -> list[Finding]:
    remedy = "`python build.py path quantize` prints the folder of what was built."
    if not folder.is_dir():
        return [error(name, f"no folder {folder}", "the folder of a checkpoint", remedy)]
    lacking = [pattern for pattern in ("config.json", "*.safetensors") if not any(folder.glob(pattern))]
    return (
        [error(name, f"no {' and no '.join(lacking)} in {folder}", "the folder of a checkpoint", remedy)]
        if lacking
        else []
    )
