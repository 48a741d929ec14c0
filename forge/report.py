"""Plans, states, findings and results as tables for a person."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from forge.compare import verdict
from forge.finding import Finding
from forge.plan import Context, Explanation, Plan, age
from forge.store import Artifact

_STATES = {"cached": "green", "run": "bold cyan", "waits": "cyan", "blocked": "red"}
# A path that is cut or broken cannot be copied; the terminal itself breaks the line.
_WHOLE: dict[str, Any] = {"no_wrap": True, "overflow": "ignore"}
_VERDICTS = {"kept": "green", "lost": "red", "control": "dim"}
_LEVELS = {"error": "bold red", "warning": "yellow", "note": "dim"}


def clock(seconds: float) -> str:
    """`0:09`, `12:30`, `14:12:00`."""
    seconds = max(0, round(seconds))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


def size(count: float) -> str:
    """Bytes in decimal units: `1.7 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _near(path: Path | None) -> str:
    """A path as seen from here, if it lies below."""
    path = path or Path()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=right)
    return table


def of_plan(plan: Plan) -> RenderableType:
    table = _table("stage", "state", ">time", ">memory", ">disk", "why")
    for stage in plan.stages:
        idle = stage.state == "cached"
        about = "" if stage.estimate.measured else "~"
        table.add_row(
            stage.name,
            Text(stage.state, style=_STATES[stage.state]),
            "" if idle else about + clock(stage.estimate.seconds),
            "" if idle else f"{stage.estimate.memory_gb:g} GB",
            "" if idle else about + size(stage.estimate.disk_gb * 1e9),
            Text(stage.why, style="dim" if idle else ""),
        )
    blocked = [stage.name for stage in plan.stages if stage.state == "blocked"]
    if blocked and not plan.pending:
        return Group(
            table, Text(f"\n{plan.recipe} · {plan.executor}: cannot run: {', '.join(blocked)}", style="red")
        )
    if not plan.pending:
        return Group(table, Text(f"\n{plan.recipe} · {plan.executor}: everything is built", style="green"))
    total = (
        f"{len(plan.pending)} of {len(plan.stages)} to run: about {clock(plan.seconds)},"
        f" {size(plan.disk_gb * 1e9)} of disk, {plan.memory_gb:g} GB of memory"
    )
    return Group(table, Text(f"\n{plan.recipe} · {plan.executor}: {total}", style="bold"))


def of_status(
    plan: Plan, newest: dict[str, Artifact | None], holder: str, ending: dict[str, Any] | None
) -> RenderableType:
    """Every stage and its newest artifact; who is running (`holder`), or how the last run ended unless
    well.
    """
    table = _table("stage", "state", "built", ">took", ">size", "key")
    for stage in plan.stages:
        artifact = stage.artifact or newest[stage.name]
        old = artifact is not None and stage.artifact is None
        cells = (
            ["never", "", "", ""]
            if artifact is None
            else [
                age(artifact.created) + (" (older)" if old else ""),
                clock(artifact.manifest["seconds"]),
                size(artifact.bytes),
                artifact.key[:12],
            ]
        )
        table.add_row(stage.name, Text(stage.state, style=_STATES[stage.state]), *cells)
    if holder:
        return Group(table, Text(f"\na run is under way: {holder}", style="cyan"))
    if ending and ending["event"] == "failed":
        return Group(
            table,
            Text(
                f"\nthe last run failed in {ending['stage'] or 'preparation'}: {ending['found']}", style="red"
            ),
        )
    if ending and ending["event"] == "interrupted":
        return Group(
            table,
            Text(
                f"\nthe last run was stopped in {ending['stage'] or 'preparation'}; to go on:"
                f" {ending['resume']}",
                style="yellow",
            ),
        )
    return table


def finding_line(finding: dict[str, Any]) -> Text:
    style = _LEVELS[finding.get("level", "error")]
    said = (
        finding["found"]
        if finding.get("level") == "note"
        else f"found {finding['found']}; expected {finding['expected']}"
    )
    text = Text.assemble((finding["subject"], style), f": {said}", **_WHOLE)
    return text.append(f"\n  {finding['remedy']}", style="dim") if finding["remedy"] else text


def of_findings(findings: list[Finding]) -> RenderableType:
    return Group(*(finding_line(f.__dict__) for f in findings))


def of_audit(audit: dict[str, Any]) -> RenderableType:
    """What a checkpoint is, the flags its vLLM needs, and its faults; of those that differ in numbers
    only, the first and how many.
    """
    parts: list[RenderableType] = []
    if its := audit["facts"]:
        table = Table.grid(padding=(0, 2, 0, 0))
        cache = f", {its['kv_cache']} cache" if its["kv_cache"] else ""
        rows = {
            "format": its["format"] + cache,
            "layout": its["layout"],
            "dtypes": its["dtypes"],
            "tensors": f"{its['tensors']:,} in {its['files']} file{'s' if its['files'] > 1 else ''}",
            "quantised": (
                f"{its['quantised']:,} linears, {its['excludes']:,} excludes" if its["layout"] else ""
            ),
            "bytes": f"{its['bytes']:,}",
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
        parts += [Text(shlex.join(words), **_WHOLE), Text()]
    alike: dict[str, list[dict[str, Any]]] = {}
    for finding in audit["findings"]:
        alike.setdefault(re.sub(r"\d+", "#", str(finding)), []).append(finding)
    for first, *more in alike.values():
        parts.append(finding_line(first))
        if more:
            parts.append(
                Text(f"  and {len(more):,} more like it, to {more[-1]['subject']}", style="dim", **_WHOLE)
            )
    count = len(audit["findings"])
    parts.append(
        Text(
            f"{count:,} faults" if count > 1 else "1 fault" if count else "no faults",
            style="bold red" if count else "green",
        )
    )
    return Group(*parts)


def failure(event: dict[str, Any]) -> RenderableType:
    """A failed stage: what was found, what was expected, what to do; the last lines of its log and where
    it lies.
    """
    parts: list[RenderableType] = [Text()]
    if event["tail"]:
        parts += [Text(f"  {line}", style="dim") for line in event["tail"]] + [Text()]
    parts.append(Text(f"{event['subject'] or event['stage']} failed", style="bold red"))
    for word in ("found", "expected", "remedy"):
        if event[word]:
            parts.append(Text.assemble((f"  {word:<9}", "dim"), event[word]))
    if event["log"]:
        parts.append(Text.assemble(("  log      ", "dim"), _near(Path(event["log"])), **_WHOLE))
    return Group(*parts)


def of_behaviour(report: Path) -> RenderableType:
    """The table of a `report` artifact: shares of questions passed, by category, and failures by mode."""
    its = json.loads((report / "report.json").read_text())
    columns = its["columns"]
    table = _table("behaviour", *(f">{c}" for c in columns))
    table.add_row(
        Text("all questions", style="bold"),
        *(Text(f"{its['pass'][c]:.0%}", style="bold " + _shade(its["pass"][c])) for c in columns),
    )
    for category in its["by_category"][columns[0]]:
        shares = [its["by_category"][c].get(category, 0.0) for c in columns]
        table.add_row(f"  {category}", *(Text(f"{share:.0%}", style=_shade(share)) for share in shares))
    modes = [m for m in its["modes"] if any(its["failures"][c].get(m) for c in columns)]
    if modes:
        table.add_section()
        table.add_row(Text("failures", style="bold"))
        for mode in modes:
            table.add_row(f"  {mode}", *(str(its["failures"][c].get(mode) or "·") for c in columns))
    return Group(
        table,
        Text(),
        Text.assemble(
            f"{its['questions']} questions, asked through vLLM {its['vllm']}; ", _gate(its["gate"])
        ),
    )


def _gate(gate: dict[str, Any]) -> Text:
    if gate["passed"]:
        return (
            Text("no gate was set, nothing was checked", style="yellow")
            if gate.get("unchecked")
            else Text("gate passed", style="green")
        )
    return Text("gate not passed: " + "; ".join(gate["why"]), style="red")


def of_shares(report: Path) -> RenderableType:
    """The share of passed questions of every column of a `report` artifact, and its gate, in one line."""
    its = json.loads((report / "report.json").read_text())
    shares = ", ".join(f"{column} {its['pass'][column]:.0%}" for column in its["columns"])
    return Text.assemble(f"{its['questions']} questions passed: {shares}; ", _gate(its["gate"]))


def _shade(share: float) -> str:
    return "green" if share >= 0.9 else "yellow" if share >= 0.5 else "red"


def of_warm(made: dict[str, Any]) -> RenderableType:
    """What `build.py warm` compiled and what is kept."""
    kept = f"{size(made['bytes'])} in {_near(Path(made['folder']))}"
    return Text(
        f"{made['compiled']} kernels compiled, {made['tuned']} tuned, {made['loaded']} compiled before;"
        f" {kept}"
    )


def of_compare(rows: list[dict[str, Any]], picture: Path) -> RenderableType:
    """The variants of a recipe, a row each: questions passed at every step, and what four bits cost on
    held-out tokens; then which variants keep what was tuned.
    """
    columns = ("base", "tuned", "merged", "nvfp4")
    table = _table("variant", *(f">{c}" for c in columns), ">loss", ">nvfp4", ">KL", ">error", "")
    table.columns[0].min_width = max(len(row["variant"]) for row in rows)  # a name that is cut says nothing
    table.columns[-1].min_width = max(len(row["verdict"]) for row in rows)
    for row in rows:
        shares = [row["pass"].get(c) for c in columns]
        cells = [
            Text("·") if share is None else Text(f"{share:.0%}", style=_shade(share)) for share in shares
        ]
        its = row["fidelity"]
        figures = (
            [
                f"{its['loss']['source']:.3f}",
                f"{its['loss']['quantised']:.3f}",
                f"{its['kl']:.4f}",
                f"{its['layers'][-1]:.1%}",
            ]
            if its
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
        Text(f"{note}\npicture, with the error of every layer: {_near(picture)}", style="dim"),
    )


def of_exchange(report: Path) -> RenderableType:
    """One exchange with the served model: the question and the answer; the system prompt stays out."""
    its = json.loads((report / "exchange.json").read_text())
    lines: list[RenderableType] = []
    for message in [m for m in its["messages"] if m["role"] != "system"] + [
        {"role": "nvfp4", **its["answers"]["nvfp4"]}
    ]:
        who = message["role"]
        said = message.get("content") or ""
        for call in message.get("tool_calls") or []:
            function = call.get("function", call)
            said = f"{said} [calls {function['name']}({function['arguments']})]".strip()
        lines.append(Text.assemble((f"{who:>9}  ", "bold cyan" if who == "nvfp4" else "bold"), said))
    return Group(*lines)


def of_result(plan: Plan, ran: tuple[str, ...], folder: Path | None) -> RenderableType:
    """How a run that succeeded left things: one line, or two."""
    last = next((s for s in reversed(plan.stages) if s.artifact), None)
    done = f"ran {', '.join(ran)}" if ran else f"nothing to do: {len(plan.stages)} stages are built"
    text = Text.assemble((f"{plan.recipe} · {plan.executor}: ", "bold"), (done, "green"), **_WHOLE)
    if ran and last and last.artifact:
        text.append(f"\n{last.name}: {_near(last.artifact.folder)}\nlogs: {_near(folder)}", style="dim")
    return Group(text)  # a bare Text is joined to a new one by print, which then wraps it


def of_demo(report: Path) -> RenderableType:
    return Group(Text(), of_behaviour(report), Text(), of_exchange(report))


def of_explanation(its: Explanation) -> RenderableType:
    """A stage, its state, and each changed component in one line."""
    stage = its.stage
    head = Text.assemble((stage.name, "bold"), ": ", (stage.state, _STATES[stage.state]), f", {stage.why}")
    keys = f"  key {(its.old or 'none')[:12]} -> {(stage.key.sha256 or 'open')[:12]}"
    if stage.state == "cached" or its.old is None:
        return Group(head, Text(f"  key {(stage.key.sha256 or 'open')[:12]}", style="dim"))
    return Group(head, Text(keys, style="dim"), *(Text(f"  {change.phrase}") for change in its.changes))


def of_doctor(findings: list[Finding], context: Context) -> RenderableType:
    subject = f"{context.recipe.name} · {context.executor}"
    if not findings:
        return Text(f"{subject}: this machine has what it takes", style="green")
    return Group(Text(subject, style="bold"), of_findings(findings))
