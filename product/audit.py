"""The audit of a checkpoint folder, run where the model's code runs: in the image of stage quantize."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from forge import artifact_types, contract, report
from forge.executor import Executor
from forge.finding import Finding, Refused, error
from forge.follow import protocol_event
from forge.plan import Context
from forge.program import Program
from product import QUANTIZE

MODULE = "audit"


def audit(
    context: Context,
    executor: Executor,
    folder: Path,
    base: Path | None = None,
    vllm: str | None = None,
    deep: bool = False,
) -> dict[str, Any]:
    """`facts`, `serve` and `findings` of docs/formats.md. A deep audit shows a progress bar on stderr.

    Refused if a folder holds no checkpoint, or the audit itself cannot run.
    """
    folders = {"FOLDER": folder} | ({"--base": base} if base else {})
    missing = [finding for name, path in folders.items() for finding in _no_checkpoint(name, path)]
    if deep and not base:
        remedy = "Add --base FOLDER: `--deep` compares every packed weight with it."
        missing.append(error("--deep", "no --base", "the folder that the checkpoint was made from", remedy))
    if missing:
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
    arguments += ["--deep"] if deep else []
    return _answer(executor.command(program, arguments))


def _answer(command: list[str]) -> dict[str, Any]:
    """The last line that the audit prints. Its errors go to a file, because a full pipe stops it."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout
            try:
                last = _last_line(process.stdout)
            except BaseException:
                process.terminate()
                raise
        errors.seek(0)
        said = " | ".join(errors.read().strip().splitlines()[-3:]) or "nothing"
    try:
        answer: dict[str, Any] = json.loads(last)
        return answer
    except ValueError as fault:
        found = f"exit status {process.returncode} and no audit; it said: {said}"
        raise Refused(
            error("audit", found, "the audit as JSON", "It is a fault of the audit or of its image.")
        ) from fault


def _last_line(lines: Iterable[str]) -> str:
    """The last of the lines. Those before it are `progress` events, which become a progress bar."""
    last, shown = "", 0.0
    with ExitStack() as bar:
        on_bytes = None
        for last in lines:
            if (event := protocol_event(last)) is None or event["event"] != "progress":
                continue
            on_bytes = on_bytes or bar.enter_context(report.reading(round(event["total"] * 1e9)))
            on_bytes(round((event["done"] - shown) * 1e9))
            shown = event["done"]
    return last


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
