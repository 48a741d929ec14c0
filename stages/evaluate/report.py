"""The report of an evaluation: numbers for programs, a table and a picture for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.evaluate.gate import judge
from stages.serving import checks
from stages.serving.checks import FORM, MODES, Failure


def summarise(
    questions: list[dict[str, Any]],
    failures: dict[str, list[list[Failure]]],
    gate: dict[str, Any] | str,
    control: bool = False,
) -> dict[str, Any]:
    """Shares and counts by column, mode and category, and the verdict of the recipe's `gate`
    (stages/evaluate/gate.py).

    `failures` maps a column to the failures of each answer.
    """
    off = {mode: n for mode in MODES if (n := sum(mode in checks.off(q) for q in questions))}
    judged = [mode for mode in MODES if off.get(mode, 0) < len(questions)]
    categories = list(dict.fromkeys(q["category"] for q in questions))
    passed = {
        column: sum(not faults for faults in by_answer) / len(questions)
        for column, by_answer in failures.items()
    }
    mode_counts = {
        column: {
            mode: sum(any(f.mode == mode for f in faults) for faults in by_answer) for mode in (*MODES, FORM)
        }
        for column, by_answer in failures.items()
    }
    by_category = {
        column: {
            c: (
                sum(not faults for q, faults in zip(questions, by_answer, strict=False) if q["category"] == c)
                / sum(q["category"] == c for q in questions)
            )
            for c in categories
        }
        for column, by_answer in failures.items()
    }
    # an answer that says nothing fails in a mode that is off, and FORM is there if a question asks for one
    failed = {mode for counts in mode_counts.values() for mode, count in counts.items() if count}
    asked_form = {FORM for q in questions if {"regex", "json_schema"} & q.get("expect", {}).keys()}
    return {
        "columns": list(failures),
        "modes": [mode for mode in (*MODES, FORM) if mode in {*judged, *failed, *asked_form}],
        "off": off,
        "questions": len(questions),
        "pass": passed,
        "failures": mode_counts,
        "by_category": by_category,
        "gate": judge(gate, passed, len(questions), control),
        "control": control,
    }


def markdown(summary: dict[str, Any]) -> str:
    """The report as aligned Markdown tables."""
    columns = summary["columns"]
    share = [["answers without a fault", *(f"{summary['pass'][c]:.0%}" for c in columns)]]
    share += [
        [category, *(f"{summary['by_category'][c][category]:.0%}" for c in columns)]
        for category in summary["by_category"][columns[0]]
    ]
    modes = [[mode, *(str(summary["failures"][c][mode]) for c in columns)] for mode in summary["modes"]]
    return (
        f"# Behaviour\n\n{summary['questions']} held-out questions, answered by vLLM {summary['vllm']}."
        f" {summary['gate']['says']}{_off(summary)}\n\n"
        + table(["passed", *columns], share)
        + "\n"
        + table(["answers with", *columns], modes)
    )


def _off(summary: dict[str, Any]) -> str:
    """A sentence about the checks that were off; "" if none was."""
    names = [f"{mode} ({count} of {summary['questions']})" for mode, count in summary["off"].items()]
    return f" Checks that were off: {', '.join(names)}." if names else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    """An aligned Markdown table; all columns but the first are aligned to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        return (
            "| "
            + " | ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=False))
            )
            + " |\n"
        )

    rule = (
        "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|\n"
    )
    return line(head) + rule + "".join(line(row) for row in rows)


def draw_picture(path: Path, summary: dict[str, Any]) -> None:
    """Draws failure modes by column as a heat map, with the share of passed questions above it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns, modes = summary["columns"], summary["modes"]
    counts = [[summary["failures"][c][m] for c in columns] for m in modes]
    figure, axis = pyplot.subplots(figsize=(6.4, 4.6), layout="constrained")
    axis.imshow(counts, cmap="Oranges", vmin=0, vmax=summary["questions"], aspect="auto")
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            axis.text(
                x,
                y,
                str(count),
                ha="center",
                va="center",
                color="white" if count > 0.6 * summary["questions"] else "#1f2933",
                fontsize=9,
            )
    axis.set_xticks(range(len(columns)), [f"{c}\n{summary['pass'][c]:.0%} pass" for c in columns])
    axis.set_yticks(range(len(modes)), [m.replace("_", " ") for m in modes])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(f"answers with a fault, of {summary['questions']}", loc="left", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
