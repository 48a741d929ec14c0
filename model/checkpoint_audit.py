"""Audits any checkpoint of a known family: what it is, what is wrong with it, and what a vLLM needs to serve
it.

    python -m model.checkpoint_audit FOLDER [--base FOLDER [--deep]] [--vllm VERSION]

prints the audit as JSON (docs/formats.md) and exits with 1 if there are findings. No stage imports this
module, so a change of what vLLM needs does not make a training run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from model import faults, layouts, packed_audit
from model.audit import QUANT, UNREADABLE, packed_modules
from model.families import registry, serve
from model.families.family import Family, Linear
from model.families.serve import Serve, ServingError
from model.faults import Finding, unreadable
from model.weights import quant_config
from model.weights.checkpoint import Checkpoint
from model.weights.quant_config import QuantConfig

BEFORE_MERGE = (
    "Only tensors that an adapter changes differ: --base is probably the base before the merge. Give it the"
    " folder that was quantised; `python build.py path merge` prints it."
)


@dataclass(frozen=True)
class Audit:
    """`facts` describe the checkpoint; they are empty if it cannot be read. `serve` is what the requested
    vLLM needs; None if none was requested or it cannot serve the checkpoint.
    """

    findings: list[Finding]
    facts: dict[str, Any] = field(default_factory=dict)
    serve: Serve | None = None

    def as_json(self) -> dict[str, Any]:
        needs = {"args": self.serve.args, "env": self.serve.env} if self.serve else None
        return {"facts": self.facts, "serve": needs, "findings": [f.as_json() for f in self.findings]}


def audit(
    folder: Path,
    base: Path | None = None,
    vllm: str | None = None,
    deep: bool = False,
    on_progress: packed_audit.Progress | None = None,
) -> Audit:
    """Audits a checkpoint of any known family: BF16 or NVFP4, in any recognised layout.

    `base` is the checkpoint that this one was made from. In an NVFP4 checkpoint all unquantised tensors must
    equal the base's, and a sample of the packed ones (`deep`: all of them) is compared as packed_audit.py
    says. In a BF16 one all tensors but the linears must equal the base's, because an adapter changes linears
    only. `vllm` is a version; `0.32.0+cpu` means one without a GPU.
    """
    findings: list[Finding] = []
    try:
        findings += faults.files(folder)
        checkpoint = Checkpoint(folder)
    except UNREADABLE as error:
        # faults.files has already reported what stops Checkpoint
        return Audit(findings or [unreadable(folder.name, error)])
    try:
        config, family = checkpoint.config, registry.of(checkpoint.config)
        configs = quant_config.read(folder, config)
        plain = family.tensors(config)
    except UNREADABLE as error:
        return Audit([*findings, unreadable(folder.name, error)])
    packed = packed_modules(checkpoint)
    facts: dict[str, Any] = {
        "format": "BF16",
        "layout": None,
        "dtypes": family.precisions[0],
        "kv_cache": None,
        "tensors": len(checkpoint.entries),
        "files": len(checkpoint.files),
        "bytes": checkpoint.bytes,
        "quantised": len(packed),
        "excludes": 0,
        "compared": None,
    }
    chosen: list[str] = []
    record = packed_audit.Record()
    if packed or configs:
        precision = family.precision({n: e.dtype for n, e in checkpoint.entries.items()})
        plain = family.in_precision(config, precision)
        layout, chosen = layouts.recognise(config, packed)
        facts |= {
            "format": configs[0].algorithm if configs else "NVFP4",
            "layout": layout,
            "dtypes": precision,
        }
        facts |= {"kv_cache": configs[0].kv_cache, "excludes": len(configs[0].excludes)} if configs else {}
        findings += settings(checkpoint, family, packed, configs)
        if facts["format"] not in quant_config.ALGORITHMS:
            return Audit(findings, facts)
        expected = layouts.packed_tensors(plain, chosen, input_scales=has_input_scales(checkpoint))
        findings += faults.structure(checkpoint, expected)
        try:
            record = packed_audit.record(folder)
        except UNREADABLE as error:
            findings.append(unreadable(packed_audit.RECORD, error))
        try:
            findings += faults.scales(checkpoint, expected)
            if record.input_scales and not any(f.subject.endswith(".input_scale") for f in findings):
                findings += packed_audit.input_scales(checkpoint, chosen, record.input_scales)
        except UNREADABLE as error:
            findings.append(unreadable(folder.name, error))
        unchanged = [n for n in plain if expected[n].dtype != "U8"]
    else:
        findings += faults.structure(checkpoint, plain)
        adapted = {linear.weight for linear in family.linears(config)}
        unchanged = [n for n in plain if n not in adapted]
    if base:
        try:
            source = Checkpoint(base)
            differing = list(faults.unchanged(checkpoint, source, unchanged, family.never_cast))
            shapes = {name: entry.shape for name, entry in source.entries.items()}
            compared = [name for name in unchanged if shapes.get(name) == plain[name].shape]
            findings += before_merge(differing, compared, family.linears(config))
        except UNREADABLE as error:
            findings.append(unreadable(f"--base {base.name}", error))
        else:
            if chosen:
                found, facts["compared"] = packed_audit.compare(
                    checkpoint, source, whole(chosen, findings), record.rule, deep, on_progress
                )
                findings += found
    if vllm is None:
        return Audit(findings, facts)
    needs, serving_findings = serving_needs(vllm, config, facts, packed)
    return Audit([*findings, *serving_findings], facts, needs)


def before_merge(differing: list[Finding], compared: list[str], linears: Sequence[Linear]) -> list[Finding]:
    """Findings of `faults.unchanged`, with their likely cause if it is the wrong `base`: of the tensors
    `compared`, only linears differ, more than one, and in every layer alike.
    """
    parts = {linear.weight: linear.part for linear in linears}
    names = {finding.subject for finding in differing}
    adapted = {parts.get(name) for name in names}
    alike = {name for name in compared if parts.get(name) in adapted}
    if len(names) < 2 or None in adapted or names != alike:
        return differing
    return [replace(finding, remedy=BEFORE_MERGE) for finding in differing]


def whole(modules: list[str], findings: list[Finding]) -> list[str]:
    """Those of the linears `modules` whose codes and scales nothing was found about yet."""
    reported = {finding.subject for finding in findings}
    return [
        module
        for module in modules
        if reported.isdisjoint((module, *(f"{module}.{part}" for part in packed_audit.PARTS)))
    ]


def has_input_scales(checkpoint: Checkpoint) -> bool:
    return any(n.endswith(".input_scale") for n in checkpoint.entries)


def settings(
    checkpoint: Checkpoint, family: Family, packed: set[str], configs: list[QuantConfig]
) -> list[Finding]:
    """Compares the quantisation settings with what is in the files."""
    if not configs:
        return [
            Finding(
                QUANT,
                "no such file, and no quantization_config in config.json",
                f"one of them, for {len(packed)} quantised linears",
                "vLLM would read packed weights as BF16: write it.",
            )
        ]
    first = configs[0]
    if not packed:
        return [
            Finding(
                first.file,
                f"{first.algorithm}, and no quantised linear in the files",
                "both or none",
                "Remove the settings of what is BF16, or take the quantised files.",
            )
        ]
    findings = [
        *faults.settings(configs),
        *faults.excludes(checkpoint, family.excludable(checkpoint.config), packed, first),
    ]
    if first.algorithm == "NVFP4" and not has_input_scales(checkpoint):
        findings.append(
            Finding(
                first.file,
                "quant_algo NVFP4, and no input_scale in the files",
                "W4A16_NVFP4, or an input_scale for each linear",
                "vLLM would compute with whatever memory holds: say W4A16_NVFP4 of a weight-only export, in"
                " config.json.",
            )
        )
    return findings


def serving_needs(
    vllm: str, config: dict[str, Any], facts: dict[str, Any], packed: set[str]
) -> tuple[Serve | None, list[Finding]]:
    """What this vLLM version needs to serve the checkpoint; None and the reasons if it cannot. `packed`: the
    quantised modules.
    """
    serving = serve.of(config)
    checkpoint = serve.Served(
        None if facts["format"] == "BF16" else serving.layout_of(packed),
        weight_only=not quant_config.ALGORITHMS.get(facts["format"], True),
        fp8_cache=facts["kv_cache"] == "FP8",
    )
    try:
        limits = serving.limits(vllm, checkpoint)
    except ServingError as error:
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
    return serving.flags(vllm, "cpu" if "+cpu" in vllm else "cuda", checkpoint, "auto"), []


def main(on_progress: packed_audit.Progress | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m model.checkpoint_audit")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--deep", action="store_true")
    parser.add_argument("--vllm")
    result = audit(**vars(parser.parse_args()), on_progress=on_progress)
    print(json.dumps(result.as_json()))
    sys.exit(bool(result.findings))


if __name__ == "__main__":
    main()
