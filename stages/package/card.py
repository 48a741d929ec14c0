"""The model card: what the model is, how it behaves, what it was made from, and how to run it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from model.families.serve import Served
from model.weights import origin
from model.weights.origin import Origin
from stages import job

TEMPLATE = Path(__file__).parent / "card.md.j2"
LICENCE = ("license", "license_name", "license_link")
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Made:
    """What the model was made from: the base's repository and licence, and the content of stats.json and
    training.json.
    """

    origin: Origin | None
    licence: dict[str, str]
    data: dict[str, Any]
    training: dict[str, Any]

    @classmethod
    def of(cls, inputs: dict[str, Path]) -> Made:
        """Read from the artifacts of stages base, data and train."""
        source = origin.read(inputs["base"])
        return cls(
            source,
            licence(inputs["base"], source),
            json.loads((inputs["data"] / "stats.json").read_text()),
            json.loads((inputs["train"] / "training.json").read_text()),
        )


def licence(base: Path, source: Origin | None) -> dict[str, str]:
    """The keys on the licence in the YAML head of the base's README.md; none where it has none. Warns of a
    head that is no YAML.
    """
    path = base / "README.md"
    parts = path.read_text(errors="replace").split("---\n", 2) if path.is_file() else []
    if len(parts) < 3 or parts[0]:
        return {}
    try:
        head = yaml.safe_load(parts[1])
    except yaml.YAMLError as fault:
        job.warning(f"README.md of the base has a head that is no YAML: {fault}", "The card names no licence")
        return {}
    values = head if isinstance(head, dict) else {}
    found = {name: values[name] for name in LICENCE if isinstance(values.get(name), str)}
    link = found.get("license_link", "")
    if source and link and "://" not in link:  # a file of the base's repository
        found["license_link"] = f"{HUB}/{source.repository}/blob/{source.commit}/{link}"
    return found


def markdown(
    serve: dict[str, Any],
    report: dict[str, Any],
    checkpoint: Served,
    provenance: dict[str, dict[str, str]],
    made: Made,
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
        head=head(serve, form, made),
        name=serve["served_name"],
        assistant=serve["assistant"],
        service=serve["service"],
        base=made.origin.repository.rpartition("/")[2] if made.origin else "a NemotronH",
        origin=made.origin,
        hub=HUB,
        data=made.data,
        training=made.training,
        inserts=bool(serve["front"]["default_prompt"]),
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


def head(serve: dict[str, Any], form: str, made: Made) -> str:
    """The YAML head that the Hugging Face hub reads."""
    base = (
        {
            "base_model": made.origin.repository,
            "base_model_relation": "adapter" if serve["serves"] == "tuned" else "finetune",
        }
        if made.origin
        else {}
    )
    values = {
        **base,
        **made.licence,
        "library_name": "vllm",
        "pipeline_tag": "text-generation",
        "tags": ["nemotron_h", "lora", form.lower(), "conversational"],
    }
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
    return text


def table(head: list[str], rows: list[list[str]]) -> str:
    """An aligned Markdown table."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + " |\n"

    return (
        line(head) + "|" + "|".join("-" * (width + 2) for width in widths) + "|\n" + "".join(map(line, rows))
    )
