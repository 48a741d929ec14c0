"""The audit of any NemotronH checkpoint: what it is, what is wrong with it, and what a vLLM needs to serve
it.

    python -m model.checkpoint_audit FOLDER [--base FOLDER] [--vllm VERSION]

prints it as JSON (docs/formats.md) and exits with 1 if there are findings. No stage imports this module:
what vLLM needs is not to decide whether a training has to run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model import faults
from model.audit import QUANT, UNREADABLE, packed_modules
from model.families.nemotron_h import layout as layouts
from model.families.nemotron_h import names, serving
from model.families.nemotron_h.names import Spec
from model.faults import Finding, unreadable
from model.weights import quant_config
from model.weights.checkpoint import Checkpoint
from model.weights.quant_config import QuantConfig

PRECISIONS = {  # by whether the router is F32
    False: "A_log and D in F32, router in BF16, as in the BF16 repository",
    True: "router in F32, A_log and D in BF16, as in NVIDIA's NVFP4 repository",
}


@dataclass(frozen=True)
class Audit:
    """`facts` describe the checkpoint (none if it cannot be read); `serve` is what the vLLM that was asked
    about needs, if it can serve it.
    """

    findings: list[Finding]
    facts: dict[str, Any] = field(default_factory=dict)
    serve: serving.Serve | None = None

    def as_json(self) -> dict[str, Any]:
        needs = {"args": self.serve.args, "env": self.serve.env} if self.serve else None
        return {"facts": self.facts, "serve": needs, "findings": [f.as_json() for f in self.findings]}


def audit(folder: Path, base: Path | None = None, vllm: str | None = None) -> Audit:
    """The audit of any NemotronH checkpoint: BF16 or NVFP4, in a layout that is recognised.

    `base` is what it was made from. An NVFP4 checkpoint has to equal it in all that is not quantised; a
    BF16 one in all that no adapter changes, which is everything but the projections. `vllm` is a version,
    `0.32.0+cpu` for one without a GPU.
    """
    found: list[Finding] = []
    try:
        found += faults.files(folder)
        its = Checkpoint(folder)
    except UNREADABLE as error:
        # what stops Checkpoint has been found file by file
        return Audit(found or [unreadable(folder.name, error)])
    try:
        config = its.config
        said = quant_config.read(folder, config)
        plain = names.tensors(config)
    except UNREADABLE as error:
        return Audit([*found, unreadable(folder.name, error)])
    packed = packed_modules(its)
    facts = {
        "format": "BF16",
        "layout": None,
        "dtypes": PRECISIONS[False],
        "kv_cache": None,
        "tensors": len(its.entries),
        "files": len(its.files),
        "bytes": its.bytes,
        "quantised": len(packed),
        "excludes": 0,
    }
    if packed or said:
        float32_router = any(e.dtype == "F32" for n, e in its.entries.items() if n.endswith(".gate.weight"))
        plain = names.tensors(config, names.FLOAT32_NVFP4 if float32_router else names.FLOAT32)
        layout, chosen = layouts.recognise(config, packed)
        facts |= {
            "format": said[0].algorithm if said else "NVFP4",
            "layout": layout,
            "dtypes": PRECISIONS[float32_router],
        }
        facts |= {"kv_cache": said[0].kv_cache, "excludes": len(said[0].excludes)} if said else {}
        found += settings(its, plain, packed, said)
        if facts["format"] not in quant_config.ALGORITHMS:
            return Audit(found, facts)
        expected = layouts.packed_tensors(plain, chosen, input_scales=has_input_scales(its))
        found += [*faults.structure(its, expected), *faults.scales(its)]
        fixed = [n for n in plain if expected[n].dtype != "U8"]
    else:
        found += faults.structure(its, plain)
        fixed = [n for n in plain if not n.endswith("_proj.weight")]
    if base:
        try:
            found += faults.unchanged(its, Checkpoint(base), fixed)
        except UNREADABLE as error:
            found.append(unreadable(f"--base {base.name}", error))
    if vllm is None:
        return Audit(found, facts)
    serve, more = served(vllm, facts, any(m.endswith(".in_proj") for m in packed))
    return Audit([*found, *more], facts, serve)


def has_input_scales(its: Checkpoint) -> bool:
    return any(n.endswith(".input_scale") for n in its.entries)


def settings(
    its: Checkpoint, plain: dict[str, Spec], packed: set[str], said: list[QuantConfig]
) -> list[Finding]:
    """What is said about the quantisation against what is in the files."""
    if not said:
        return [
            Finding(
                QUANT,
                "no such file, and no quantization_config in config.json",
                f"one of them, for {len(packed)} quantised linears",
                "vLLM would read packed weights as BF16: write it.",
            )
        ]
    first = said[0]
    if not packed:
        return [
            Finding(
                first.file,
                f"{first.algorithm}, and no quantised linear in the files",
                "both or none",
                "Remove the settings of what is BF16, or take the quantised files.",
            )
        ]
    found = [*faults.settings(said), *faults.excludes(its, plain, packed, first)]
    if first.algorithm == "NVFP4" and not has_input_scales(its):
        found.append(
            Finding(
                first.file,
                "quant_algo NVFP4, and no input_scale in the files",
                "W4A16_NVFP4, or an input_scale for each linear",
                "vLLM would compute with whatever memory holds: say W4A16_NVFP4 of a weight-only export, in"
                " config.json.",
            )
        )
    return found


def served(vllm: str, facts: dict[str, Any], in_proj: bool) -> tuple[serving.Serve | None, list[Finding]]:
    """What this version needs to serve the checkpoint; None, and why, if it cannot. `in_proj`: whether any
    Mamba in_proj is quantised.
    """
    # all that serving asks of a layout
    layout = None if facts["format"] == "BF16" else "nvidia" if in_proj else "conservative"
    its = serving.Checkpoint(
        layout,
        weight_only=not quant_config.ALGORITHMS.get(facts["format"], True),
        fp8_cache=facts["kv_cache"] == "FP8",
    )
    try:
        limits = serving.limits(vllm, its)
    except serving.ServingError as error:
        limits = [error]
    if limits:
        return None, [
            Finding(
                "--vllm",
                error.found,
                "one that serves this checkpoint right",
                f"{error.remedy[0].upper()}{error.remedy[1:]}.",
            )
            for error in limits
        ]
    return serving.flags(vllm, "cpu" if "+cpu" in vllm else "cuda", its), []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.checkpoint_audit")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--vllm")
    made = audit(**vars(parser.parse_args()))
    print(json.dumps(made.as_json()))
    sys.exit(bool(made.findings))


if __name__ == "__main__":
    main()
