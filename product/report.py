"""What a checkpoint is, how a model behaves, and what variants keep, as tables for a person."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from forge.history import PastRun
from forge.report import WHOLE, clock, counted, cut, finding_line, near, plain_table, size
from forge.store import Store
from product import EVALUATE
from product.compare import verdict
from product.outcome import Failed, Outcome

_VERDICTS = {"kept": "green", "lost": "red", "control": "dim"}


def of_audit(audit: dict[str, Any]) -> RenderableType:
    """What a checkpoint is, the flags its vLLM needs, and its faults; of those that differ in numbers
    only, the first and how many.
    """
    parts: list[RenderableType] = []
    if facts := audit["facts"]:
        table = Table.grid(padding=(0, 2, 0, 0))
        cache = f", {facts['kv_cache']} cache" if facts["kv_cache"] else ""
        rows = {
            "format": facts["format"] + cache,
            "layout": facts["layout"],
            "dtypes": facts["dtypes"],
            "tensors": f"{facts['tensors']:,} in {counted(facts['files'], 'file')}",
            "quantised": (
                f"{facts['quantised']:,} linears, {facts['excludes']:,} excludes" if facts["layout"] else ""
            ),
            "bytes": f"{facts['bytes']:,}",
            "compared": _compared(facts["compared"]) if facts["compared"] else "",
        }
        for name, value in rows.items():
            if value:
                table.add_row(Text(name, style="dim"), Text(value))
        parts = [table, Text()]
    if audit["serve"]:
        words = [
            *(f"{name}={value}" for name, value in audit["serve"]["env"].items()),
            "vllm",
            "serve",
            "FOLDER",
            *audit["serve"]["args"],
        ]
        parts += [Text(shlex.join(words), **WHOLE), Text()]
    alike: dict[str, list[dict[str, Any]]] = {}
    for finding in audit["findings"]:
        alike.setdefault(re.sub(r"\d+", "#", str(finding)), []).append(finding)
    for first, *more in alike.values():
        parts.append(finding_line(first))
        if more:
            parts.append(
                Text(f"  and {len(more):,} more like it, to {more[-1]['subject']}", style="dim", **WHOLE)
            )
    count = len(audit["findings"])
    parts.append(
        Text(
            f"{count:,} faults" if count > 1 else "1 fault" if count else "no faults",
            style="bold red" if count else "green",
        )
    )
    return Group(*parts)


def _compared(compared: dict[str, Any]) -> str:
    """How much of the packed weights was compared with the base, and how."""
    whole = compared["bytes"] == compared["of"]
    part = "all" if whole else f"{compared['bytes'] / compared['of']:.0%} of"
    how = ", within rounding" if compared["rule"] == "rounding" else f" quantised again ({compared['rule']})"
    return f"{part} {size(compared['of'])} packed, with the base{how}{'' if whole else '; --deep: all'}"


def of_behaviour(folder: Path) -> RenderableType:
    """The table of a `report` artifact: shares of questions passed, by category, and failures by mode."""
    report = json.loads((folder / "report.json").read_text())
    columns = report["columns"]
    table = plain_table("behaviour", *(f">{c}" for c in columns))
    table.add_row(
        Text("all questions", style="bold"),
        *(Text(f"{report['pass'][c]:.0%}", style="bold " + _shade(report["pass"][c])) for c in columns),
    )
    for category in report["by_category"][columns[0]]:
        shares = [report["by_category"][c].get(category, 0.0) for c in columns]
        table.add_row(f"  {category}", *(Text(f"{share:.0%}", style=_shade(share)) for share in shares))
    modes = [m for m in report["modes"] if any(report["failures"][c].get(m) for c in columns)]
    if modes:
        table.add_section()
        table.add_row(Text("failures", style="bold"))
        for mode in modes:
            table.add_row(f"  {mode}", *(str(report["failures"][c].get(mode) or "·") for c in columns))
    return Group(
        table,
        Text(),
        Text.assemble(
            f"{report['questions']} questions, asked through vLLM {report['vllm']}; ",
            _gate(report["gate"]),
            _off(report),
        ),
    )


def _off(report: dict[str, Any]) -> str:
    """The checks that were off; a report of an older version does not say so."""
    return f"; off: {', '.join(report['off'])}" if report.get("off") else ""


def _gate(gate: dict[str, Any]) -> Text:
    if gate["passed"]:
        return (
            Text("no gate was set, nothing was checked", style="yellow")
            if gate.get("unchecked")
            else Text("gate passed", style="green")
        )
    return Text("gate not passed: " + "; ".join(gate["why"]), style="red")


def of_outcome(outcome: Outcome, most: int = 5) -> RenderableType:
    """What a run made: questions passed by each model, at `most` so many of those that were failed, the
    held-out loss, and the verdict.
    """
    table = plain_table("model", ">passed", ">share", ">95 % interval")
    for share in outcome.shares:
        low, high = share.interval
        table.add_row(
            share.column,
            f"{share.passed} of {share.questions}",
            Text(f"{share.share:.0%}", style=_shade(share.share)),
            f"{low:.0%} to {high:>4.0%}",
        )
    parts: list[RenderableType] = [Text(), table, Text(), _gate(outcome.gate)]
    if outcome.failed:
        parts += [Text(f"\n{counted(len(outcome.failed), 'question')} failed", style="bold")]
        parts += [_failed(question) for question in outcome.failed[:most]]
        if (left := len(outcome.failed) - most) > 0:
            parts.append(Text(f"  and {left} more: python build.py report --all", style="dim"))
    if loss := _held_out(outcome.training):
        parts.append(Text(f"\n{loss}"))
    if outcome.verdict:
        parts.append(Text(f"\n{outcome.verdict}", style="bold"))
    return Group(*parts)


def _failed(failed: Failed) -> RenderableType:
    """A failed question in a few lines, each cut where the terminal ends."""
    rows = [
        ("asked", failed.question),
        ("answer", failed.answer or "nothing"),
        *(("fault", fault) for fault in failed.faults),
    ]
    return Group(
        Text.assemble("  ", (failed.id, "yellow"), f", failed by {', '.join(failed.columns)}"),
        *(cut(f"    {word:<8}", said) for word, said in rows),
    )


def _held_out(training: dict[str, Any]) -> str:
    """The held-out loss before training, at the kept step and at the last one, in nats a token; empty where
    there is none.
    """
    loss, kept, last = training.get("loss", {}), training.get("kept_step"), training.get("steps")
    places = {"held_out_base": "before", "held_out": f"at step {kept} (kept)"}
    places |= {"held_out_last": f"at step {last}"} if kept != last else {}
    said = [f"{loss[key]:.3g} {place}" for key, place in places.items() if loss.get(key) is not None]
    return f"held-out loss: {', '.join(said)}" if said else ""


def _shade(share: float) -> str:
    return "green" if share >= 0.9 else "yellow" if share >= 0.5 else "red"


def of_runs(store: Store, runs: list[PastRun]) -> RenderableType:
    """A line for each run, newest first, and what its model passed of the questions."""
    table = plain_table("run", "ended", ">took", ">size", ">passed", "made, and why")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for run in runs:
        report = store.find(EVALUATE, run.keys.get(EVALUATE))
        made = f"{_from_to(run.made)}: {run.why}" if run.made else ""
        if run.gone:
            made += f" ({_from_to(run.gone)} removed since)"
        table.add_row(
            run.stamp,
            Text(run.ending, style="green" if run.ending == "done" else "yellow"),
            "" if run.seconds is None else clock(run.seconds),
            size(run.bytes),
            _passed(report.folder) if report else "",
            made,
        )
    return table if runs else Text("no run yet", style="dim")


def _from_to(stages: tuple[str, ...]) -> str:
    return " to ".join(dict.fromkeys([stages[0], stages[-1]]))


def _passed(folder: Path) -> Text:
    """The share of questions that the last column of a `report` artifact passed."""
    try:
        report = json.loads((folder / "report.json").read_text())
        share = report["pass"][report["columns"][-1]]
        return Text(f"{share:.0%}", style=_shade(share))
    except (ValueError, LookupError, TypeError, RecursionError):  # edited since; verify says more
        return Text("damaged", style="red")


def of_warm(kernels: dict[str, Any]) -> RenderableType:
    """What `build.py warm` compiled and what is kept."""
    kept = f"{size(kernels['bytes'])} in {near(Path(kernels['folder']))}"
    return Text(
        f"{kernels['compiled']} kernels compiled, {kernels['tuned']} tuned,"
        f" {kernels['loaded']} compiled before; {kept}"
    )


def of_compare(rows: list[dict[str, Any]], picture: Path) -> RenderableType:
    """The variants of a recipe, a row each: questions passed at every step, and what four bits cost on
    held-out tokens; then which variants keep what was tuned.
    """
    columns = ("base", "tuned", "merged", "nvfp4")
    table = plain_table("variant", *(f">{c}" for c in columns), ">loss", ">nvfp4", ">KL", ">error", "")
    table.columns[0].min_width = max(len(row["variant"]) for row in rows)  # a name that is cut says nothing
    table.columns[-1].min_width = max(len(row["verdict"]) for row in rows)
    for row in rows:
        shares = [row["pass"].get(c) for c in columns]
        cells = [
            Text("·") if share is None else Text(f"{share:.0%}", style=_shade(share)) for share in shares
        ]
        fidelity = row["fidelity"]
        figures = (
            [
                f"{fidelity['loss']['source']:.3f}",
                f"{fidelity['loss']['quantised']:.3f}",
                f"{fidelity['kl']:.4f}",
                f"{fidelity['layers'][-1]:.1%}",
            ]
            if fidelity
            else ["·"] * 4
        )
        table.add_row(row["variant"], *cells, *figures, Text(row["verdict"], style=_VERDICTS[row["verdict"]]))
    note = (
        "tuned: the adapter at run time, where vLLM can; else merged stands for it. loss: merged and nvfp4,"
        " nats a held-out token. KL: to merged. error: of the last hidden states."
    )
    return Group(
        Text(),
        table,
        Text(),
        Text(verdict(rows), style="bold"),
        Text(f"{note}\npicture, with the error of every layer: {near(picture)}", style="dim"),
    )


def of_exchange(folder: Path) -> RenderableType:
    """One exchange with the served model: the question and the answer; the system prompt stays out."""
    exchange = json.loads((folder / "exchange.json").read_text())
    messages = [message for message in exchange["messages"] if message["role"] != "system"]
    return _conversation(
        [*((message["role"], message) for message in messages), ("nvfp4", exchange["answers"]["nvfp4"])]
    )


def of_asked(asked: dict[str, Any]) -> RenderableType:
    """A question, and what each model answered."""
    question = ("user", {"role": "user", "content": asked["question"]})
    return Group(Text(), _conversation([question, *asked["answers"].items()]))


def _conversation(said: list[tuple[str, dict[str, Any]]]) -> RenderableType:
    """Who said what; a model's name is in colour."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", min_width=9, no_wrap=True)
    table.add_column()
    for who, message in said:
        calls = [call.get("function", call) for call in message.get("tool_calls") or []]
        text = " ".join(
            [message.get("content") or "", *(f"[calls {c['name']}({c['arguments']})]" for c in calls)]
        )
        table.add_row(Text(who, style="bold" if "role" in message else "bold cyan"), Text(text.strip()))
    return table


def of_demo(folder: Path) -> RenderableType:
    return Group(Text(), of_behaviour(folder), Text(), of_exchange(folder))
