#!/usr/bin/env python
"""Annie's build: from conversations and a base model to an image that serves the tuned model in NVFP4."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPO = Path(__file__).resolve().parent

if __name__ == "__main__" and Path(sys.prefix) != REPO / ".venv":
    # Any `python build.py` runs in the clone's own environment, whose packages are locked.
    python = REPO / ".venv" / "bin" / "python"
    if not python.exists():
        sys.exit("found no .venv in this clone; expected the host's packages in it. Run: make .venv/.ready")
    os.execv(python, [str(python), str(REPO / "build.py"), *sys.argv[1:]])

import click  # noqa: E402

from forge import VERSION  # noqa: E402
from forge.executor import EXECUTORS  # noqa: E402

if TYPE_CHECKING:
    from forge.executor import Executor
    from forge.plan import Context


@dataclass(frozen=True)
class Opened:
    """What every command starts from."""

    context: Context
    executor: Executor


def home() -> Path:
    return Path(os.environ.get("ANNIE_HOME") or REPO / ".annie").absolute()


def opened(recipe: str, executor: str | None) -> Opened:
    from forge import executor as executors
    from forge import plan, preflight
    from forge import recipe as recipes
    from forge.store import Store

    its = recipes.load(recipes.find(recipe, REPO), REPO)
    its_executor = executors.make(executor or its.executor, REPO, home())
    gpu = preflight.gpu_architecture() if its.gpu == "cuda" else None
    return Opened(plan.Context(its, Store(home()), REPO, its_executor.name, gpu or "none"), its_executor)


def show(renderable: Any, *, to_stderr: bool = False) -> None:
    from rich.console import Console

    Console(stderr=to_stderr).print(renderable, highlight=False, crop=False)


def command(*decorators: Callable[[Any], Any]) -> Callable[[Callable[..., None]], click.Command]:
    """A click command with --recipe and --executor; findings go to stderr and end it with exit 1."""
    shared = [
        click.option(
            "--recipe",
            default="tiny",
            envvar="ANNIE_RECIPE",
            show_default=True,
            help="A name in recipes/ or a .yaml file.",
        ),
        click.option(
            "--executor",
            type=click.Choice(list(EXECUTORS)),
            help="Default: the recipe's, else docker where an engine answers.",
        ),
    ]

    def make(function: Callable[..., None]) -> click.Command:
        @wraps(function)
        def guarded(*args: Any, **values: Any) -> None:
            from forge.finding import Refused

            try:
                function(*args, **values)
            except Refused as refused:
                from forge import report

                show(report.of_findings(refused.findings), to_stderr=True)
                sys.exit(1)

        wrapped: Any = guarded
        for decorator in reversed([*decorators, *shared]):
            wrapped = decorator(wrapped)
        return cli.command()(wrapped)

    return make


as_json = click.option("--json", "as_json", is_flag=True, help="JSON, for a program.")
on_stage = click.argument("stage")
selecting = [
    click.option("--from", "first", metavar="STAGE", help="This stage and those that are made from it."),
    click.option("--until", "last", metavar="STAGE", help="This stage and those that it is made from."),
    click.option("--only", multiple=True, metavar="STAGE", help="This stage alone; may be given again."),
    click.option("--force", is_flag=True, help="Run the selected stages even if they are built."),
]


class InOrder(click.Group):
    """Commands in the order of this file, which is the order in which one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, help=__doc__, context_settings={"max_content_width": 120})
@click.version_option(VERSION, prog_name="annie", message="%(prog)s %(version)s")
def cli() -> None:
    pass


@command(*selecting, as_json)
def plan(recipe: str, executor: str | None, as_json: bool, **selected: Any) -> None:
    """What would run, why, and what it would take."""
    from forge import check, plan, report

    context = opened(recipe, executor).context
    its = plan.make(context, plan.Selection(**selected))
    findings = check.findings(context, its)
    if as_json:
        print(json.dumps({**its.as_json(), "findings": [f.__dict__ for f in findings]}, indent=1))
    else:
        show(report.of_plan(its))
        show(report.of_findings(findings), to_stderr=True) if findings else None
    sys.exit(any(f.level == "error" for f in findings))


@command(
    *selecting, as_json, click.option("--no-wait", is_flag=True, help="Exit if another run holds the store.")
)
def run(recipe: str, executor: str | None, as_json: bool, no_wait: bool, **selected: Any) -> None:
    """Runs what is not built. Ctrl-C stops it; the next run goes on where it stopped."""
    sys.exit(run_stages(recipe, executor, as_json, not no_wait, **selected))


def run_stages(recipe: str, executor: str | None, as_json: bool, wait: bool, **selected: Any) -> int:
    from forge import plan, report, run, watch
    from product import PACKAGE, serving
    from product import report as tables

    its = opened(recipe, executor)
    with watch.watcher(as_json) as watcher:
        outcome = run.run(its.context, its.executor, plan.Selection(**selected), watcher, wait)
    if PACKAGE in outcome.ran:
        serving.point_compose_to_newest(its.context)
    if outcome.code == 0 and not as_json:
        wanted = plan.make(its.context, plan.Selection(**{**selected, "force": False}))
        show(report.of_result(wanted, outcome.ran, outcome.folder))
        for shares in tables.of_reports(its.context, wanted):
            show(shares)
    return outcome.code


@command()
def demo(recipe: str, executor: str | None) -> None:
    """The whole line, then a table of what it made and one exchange."""
    from forge import plan
    from product import EVALUATE, report

    if code := run_stages(recipe, executor, False, True):
        sys.exit(code)
    show(report.of_demo(plan.artifact(opened(recipe, executor).context, EVALUATE).folder))


@command(as_json, click.option("--no-wait", is_flag=True, help="Exit if another run holds the store."))
def warm(recipe: str, executor: str | None, as_json: bool, no_wait: bool) -> None:
    """Compiles stage train's kernels for this GPU, and keeps them.

    The first run then starts as fast as every later one.
    """
    from forge import watch
    from product import report, warm

    its = opened(recipe, executor)
    with watch.watcher(as_json) as watcher:
        made = warm.warm(its.context, its.executor, watcher, not no_wait)
    if made is None:
        sys.exit(1)
    print(json.dumps({"event": "warmed", **made})) if as_json else show(report.of_warm(made))


@command(as_json)
def compare(recipe: str, executor: str | None, as_json: bool) -> None:
    """Trains and asks every variant of the recipe, in one table.

    Each is trained, merged, quantised and asked; then come one table with a verdict, and a picture.
    """
    from forge import plan, run, watch
    from product import EVALUATE, compare, picture, report

    its = opened(recipe, executor)
    variants = compare.variants(its.context)
    for name, context in variants.items():
        print(f"variant {name}", file=sys.stderr)
        with watch.watcher(as_json) as watcher:
            if code := run.run(context, its.executor, plan.Selection(last=EVALUATE), watcher).code:
                sys.exit(code)
    rows, file = compare.collect(variants), home() / f"compare-{its.context.recipe.name}.svg"
    file.write_text(
        picture.variants(rows, f"{its.context.recipe.name}: what survives four bits", compare.verdict(rows))
    )
    (
        print(json.dumps({"event": "compared", "variants": rows, "picture": str(file)}))
        if as_json
        else show(report.of_compare(rows, file))
    )


@command(on_stage, as_json)
def explain(stage: str, recipe: str, executor: str | None, as_json: bool) -> None:
    """What changed since STAGE was last built, from what to what."""
    from forge import plan, report

    its = plan.explain(opened(recipe, executor).context, stage)
    if as_json:
        print(json.dumps(its.as_json(), indent=1))
    else:
        show(report.of_explanation(its))


@command(as_json)
def status(recipe: str, executor: str | None, as_json: bool) -> None:
    """The state of every stage, and of the run under way."""
    from forge import journal, lock, plan, report

    context = opened(recipe, executor).context
    its = plan.make(context)
    newest = {s.name: context.store.newest(s.name, its.recipe, its.executor) for s in its.stages}
    holder = lock.holder(context.store.root / "lock")
    if as_json:
        print(json.dumps({**its.as_json(), "running": holder}, indent=1))
    else:
        ending = journal.last_ending(home(), its.recipe)
        show(report.of_status(its, newest, lock.describe(holder) if holder else "", ending))


@command(on_stage, click.option("--follow", "-f", is_flag=True, help="Go on until the stage ends."))
def logs(stage: str, recipe: str, executor: str | None, follow: bool) -> None:
    """STAGE's newest log, by --executor or by any."""
    from forge import journal
    from forge import recipe as recipes

    its = recipes.load(recipes.find(recipe, REPO), REPO)
    for text in journal.read_log(home(), its.name, stage, list(its.stages), follow, executor):
        print(text, end="", flush=True)


@command(on_stage)
def path(stage: str, recipe: str, executor: str | None) -> None:
    """The folder of STAGE's artifact. Prints nothing else; exit 1 if it is not built."""
    from forge import plan

    print(plan.artifact(opened(recipe, executor).context, stage).folder)


@command(as_json)
def doctor(recipe: str, executor: str | None, as_json: bool) -> None:
    """What this machine lacks for the recipe. Exit 1 if that stops it."""
    from forge import plan, report, run

    its = opened(recipe, executor)
    findings = run.lacking(its.context, its.executor, plan.make(its.context))
    if as_json:
        print(json.dumps([f.__dict__ for f in findings], indent=1))
    else:
        show(report.of_doctor(findings, its.context))
    sys.exit(any(f.level == "error" for f in findings))


@command(
    click.argument("folder", type=click.Path(path_type=Path)),
    click.option(
        "--base",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="What it was made from: the rest has to be equal.",
    ),
    click.option(
        "--vllm",
        metavar="VERSION",
        help="Also what this vLLM cannot load, and the flags it needs (0.31.0; 0.32.0+cpu without a GPU).",
    ),
    as_json,
)
def audit(
    recipe: str, executor: str | None, folder: Path, base: Path | None, vllm: str | None, as_json: bool
) -> None:
    """Checks the checkpoint in FOLDER, and exits with 1 on a fault.

    Every tensor, scale and exclude is looked at.
    """
    from product import audit, report

    its = opened(recipe, executor)
    made = audit.audit(its.context, its.executor, folder, base, vllm)
    print(json.dumps(made, indent=1)) if as_json else show(report.of_audit(made))
    sys.exit(bool(made["findings"]))


@command(
    click.option("--port", default=8000, show_default=True),
    click.option("--detach", is_flag=True, help="Leave it running and come back."),
    click.option("--stop", is_flag=True, help="Stop what is served."),
)
def serve(recipe: str, executor: str | None, port: int, detach: bool, stop: bool) -> None:
    """Serves the recipe's model on 127.0.0.1."""
    from product import serving

    its = opened(recipe, executor)
    sys.exit(serving.serve(its.context, its.executor, port=port, detach=detach, stop=stop))


@cli.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True)
@click.argument("prompt", required=False)
def chat(url: str, prompt: str | None) -> None:
    """A chat with what is being served."""
    from product import chat

    sys.exit(chat.chat(url, prompt))


if __name__ == "__main__":
    cli()
