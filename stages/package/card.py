"""The model card: what the model is, how it behaves, what it was made from, and how to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from model.families.serve import Served

TEMPLATE = Path(__file__).parent / "card.md.j2"


def markdown(
    serve: dict[str, Any],
    report: dict[str, Any],
    checkpoint: Served,
    provenance: dict[str, dict[str, str]],
) -> str:
    """The model card as Markdown. `serve` is the content of serve.json, `report` that of report.json."""
    form, weights = {
        "nvfp4": ("NVFP4", f"Layout `{checkpoint.layout}`"),
        "merged": ("BF16", "The adapter merged into the weights"),
        "tuned": ("BF16", f"The base and an adapter of rank {checkpoint.lora_rank}, added as the model runs"),
    }[serve["serves"]]
    columns = report["columns"]
    rows = [["answers without a fault", *(f"{report['pass'][c]:.0%}" for c in columns)]]
    rows += [
        [mode.replace("_", " "), *(str(report["failures"][c][mode]) for c in columns)]
        for mode in report["modes"]
    ]
    digests = [[name, source["key"][:12], source["digest"]] for name, source in sorted(provenance.items())]
    card: str = jinja2.Template(
        TEMPLATE.read_text(), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    ).render(
        name=serve["served_name"],
        service=serve["service"],
        form=form,
        weights=weights,
        vllm=serve["vllm"],
        device=serve["device"],
        questions=report["questions"],
        gate=report["gate"]["says"],
        off=", ".join(f"{mode} ({count} of {report['questions']})" for mode, count in report["off"].items()),
        port=serve["port"],
        behaviour=table(["", *columns], rows),
        digests=table(["artifact", "key", "digest"], digests),
    )
    return card


def table(head: list[str], rows: list[list[str]]) -> str:
    """An aligned Markdown table."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + " |\n"

    return (
        line(head) + "|" + "|".join("-" * (width + 2) for width in widths) + "|\n" + "".join(map(line, rows))
    )
