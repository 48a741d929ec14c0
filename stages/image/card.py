"""The model card: what it is, how it behaves, what it was made from, how to run it."""

from __future__ import annotations

CARD = """\
# {name}: Nemotron 3 Nano, fine-tuned into Annie, in NVFP4

Layout `{layout}`, served by vLLM {vllm} on {device}. Thinking is off by default.

## Behaviour
{questions} held-out questions, answered by a real vLLM at every step of the line.

{behaviour}
## Made from
{digests}
## Run
    docker compose up -d vllm-nemotron-annie
    curl -s http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'

Send `prompt.txt` as the system message and `tools.json` as `tools`: the model was trained with both.
"""


def markdown(serve: dict, report: dict, layout: str, provenance: dict[str, dict[str, str]]) -> str:
    columns = report["columns"]
    rows = [["answers without a fault", *(f"{report['pass'][c]:.0%}" for c in columns)]]
    rows += [[mode.replace("_", " "), *(str(report["failures"][c][mode]) for c in columns)] for mode in report["modes"]]
    digests = [[name, its["key"][:12], its["digest"]] for name, its in sorted(provenance.items())]
    return CARD.format(
        name=serve["served_name"], layout=layout, vllm=serve["vllm"], device=serve["device"], questions=report["questions"], port=serve["port"],
        behaviour=table(["", *columns], rows), digests=table(["artifact", "key", "digest"], digests))


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |\n"

    return line(head) + "|" + "|".join("-" * (width + 2) for width in widths) + "|\n" + "".join(map(line, rows))
