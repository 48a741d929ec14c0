#!/usr/bin/env python
"""Annie's build: from conversations and a base model to an image that serves the tuned model in NVFP4."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPO = Path(__file__).resolve().parent
DEFAULT = "tiny"

if __name__ == "__main__" and Path(sys.prefix) != REPO / ".venv":
    # Any `python build.py` runs in the clone's own environment, whose packages are locked.
    python = REPO / ".venv" / "bin" / "python"
    if not python.exists():
        sys.exit("found no .venv in this clone; expected the host's packages in it. Run: make .venv/.ready")
    os.execv(python, [str(python), str(REPO / "build.py"), *sys.argv[1:]])

import click  # noqa: E402

from forge import VERSION, modes  # noqa: E402
from forge.executors import EXECUTORS  # noqa: E402

if TYPE_CHECKING:
    from forge.executor import Executor
    from forge.history import PastRun
    from forge.plan import Context
    from forge.recipe import Recipe
    from forge.store import Store


@dataclass(frozen=True)
class Session:
    """What every command starts from."""

    context: Context
    executor: Executor


def home() -> Path:
    return Path(os.environ.get("ANNIE_HOME") or REPO / ".annie").absolute()


def open_session(recipe: str, executor: str | None) -> Session:
    from forge import executor as executors
    from forge import plan, preflight
    from forge import recipe as recipes
    from forge.store import Store

    parsed = recipes.load(recipes.find(recipe, REPO), REPO)
    started_by = executors.make(executor or parsed.executor, REPO, home())
    gpu = preflight.gpu_architecture() if parsed.gpu == "cuda" else None
    return Session(plan.Context(parsed, Store(home()), REPO, started_by.name, gpu or "none"), started_by)


def show(renderable: Any, *, to_stderr: bool = False) -> None:
    from rich.console import Console

    Console(stderr=to_stderr).print(renderable, highlight=False, crop=False)


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """The same function, whose findings go to stderr and end the program with 1."""

    @wraps(function)
    def wrapper(*args: Any, **values: Any) -> None:
        from forge.finding import Refused

        try:
            function(*args, **values)
        except BrokenPipeError:  # of what reads the output, such as head
            raise
        except (Refused, OSError) as fault:
            from forge import report, trouble

            show(report.of_findings(trouble.findings(home(), fault)), to_stderr=True)
            sys.exit(1)

    return wrapper


def speaking_of(function: Callable[..., None], says_so: bool, by_any: bool) -> Callable[..., None]:
    """The same function, given the recipe and the executor that it is to speak of. `says_so`: tells what of
    it the last run decided. `by_any`: without --executor it speaks of every executor.
    """

    @wraps(function)
    def wrapper(*, recipe: str | None, executor: str | None, named: str | None = None, **values: Any) -> None:
        from forge import last_run

        source = click.get_current_context().get_parameter_source("recipe")
        if named and named != recipe and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"two recipes, {named} and --recipe {recipe}; name one")
        choice = last_run.choose(home(), REPO, named or recipe, executor, DEFAULT)
        if choice.note and says_so and not values.get("as_json"):
            from rich.text import Text

            show(Text(choice.note, style="dim"), to_stderr=True)
        function(recipe=str(choice.recipe), executor=executor if by_any else choice.executor, **values)

    return wrapper


def command(
    *decorators: Callable[[Any], Any], on_recipe: bool = False, says_so: bool = True, by_any: bool = False
) -> Callable[[Callable[..., None]], click.Command]:
    """A click command with --recipe and --executor; findings go to stderr and end it with exit 1. One whose
    only object is a recipe (`on_recipe`) takes it as an argument too. For the rest see `speaking_of`.
    """
    shared = [
        click.option(
            "--recipe",
            envvar="ANNIE_RECIPE",
            help="A name in recipes/, a folder that holds recipe.yaml, or a .yaml file. Default: that of the"
            f" last run, else {DEFAULT}.",
        ),
        click.option(
            "--executor",
            type=click.Choice(list(EXECUTORS)),
            help="Default: that of the recipe's last run, else the recipe's, else docker where an engine"
            " answers.",
        ),
    ]

    if on_recipe:
        shared.append(click.argument("named", metavar="[RECIPE]", required=False))

    def make(function: Callable[..., None]) -> click.Command:
        wrapped: Any = guarded(speaking_of(function, says_so, by_any))
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


@cli.command()
@click.argument("name")
@click.option(
    "--from",
    "kind",
    type=click.Choice(["tiny", "annie"]),
    default="tiny",
    show_default=True,
    help="Its recipe.",
)
@guarded
def init(name: str, kind: str) -> None:
    """Writes ./NAME: a commented recipe and example data. It runs as it is."""
    from product import starter

    file = starter.write(name, kind, REPO, Path.cwd())
    print(f"wrote {file}\nnext: {shlex.join(['python', str(REPO / 'build.py'), 'plan', str(file.parent)])}")


def as_places(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        file, _, line = value.rpartition(":")
        if not file or not (line.isascii() and line.isdigit() and int(line)):
            raise click.BadParameter(f"{value!r}; expected FILE:LINE, such as conversations/call.jsonl:12")
    return values


@command(
    click.option(
        "--row",
        "places",
        multiple=True,
        metavar="FILE:LINE",
        callback=as_places,
        help="Show this row as it is trained; may be given again.",
    ),
    click.option(
        "--rows", "first", type=click.IntRange(0), metavar="N", help="Show the first N. Default: 1, or --row."
    ),
    as_json,
    click.option("--no-wait", is_flag=True, help="Exit if another run holds the store."),
    on_recipe=True,
)
def data(
    recipe: str,
    executor: str | None,
    places: tuple[str, ...],
    first: int | None,
    as_json: bool,
    no_wait: bool,
) -> None:
    """Checks every row of your data, and shows rows as trained.

    The check is that of stage data. Of the base it needs the tokenizer alone. Exit 1 if stage data would
    refuse the rows.
    """
    from forge import report, watch
    from forge.finding import error
    from product import DATA, data_shown
    from product import data as rows

    session = open_session(recipe, executor)
    shown = first if first is not None else int(not places)
    with watch.watcher(as_json) as watcher:
        seen = rows.preview(session.context, session.executor, places, shown, watcher, not no_wait)
    if seen is None:
        sys.exit(1)
    if as_json:
        print(json.dumps({"event": "previewed", **seen}))
    else:
        show(data_shown.of_preview(seen))
        if refused := seen["refused"]:
            show(report.of_findings([error(DATA, **refused)]), to_stderr=True)
    sys.exit(bool(seen["refused"]) or any(row["state"] == "absent" for row in seen["rows"]))


@command(*selecting, as_json, on_recipe=True)
def plan(recipe: str, executor: str | None, as_json: bool, **selected: Any) -> None:
    """What would run, why, and what it would take."""
    from forge import check, plan, report, same_name

    context = open_session(recipe, executor).context
    planned = plan.make(context, plan.Selection(**selected))
    findings = same_name.findings(context) + check.findings(context, planned)
    if as_json:
        print(json.dumps({**planned.as_json(), "findings": [f.__dict__ for f in findings]}, indent=1))
    else:
        show(report.of_plan(planned))
        show(report.of_findings(findings), to_stderr=True) if findings else None
    sys.exit(any(f.level == "error" for f in findings))


@command(
    *selecting,
    as_json,
    click.option("--no-wait", is_flag=True, help="Exit if another run holds the store."),
    on_recipe=True,
)
def run(recipe: str, executor: str | None, as_json: bool, no_wait: bool, **selected: Any) -> None:
    """Runs what is not built. Ctrl-C stops it; the next run goes on where it stopped."""
    sys.exit(run_stages(recipe, executor, as_json, not no_wait, **selected))


def run_stages(recipe: str, executor: str | None, as_json: bool, wait: bool, **selected: Any) -> int:
    from forge import plan, report, run, watch
    from product import outcome, serving
    from product import report as tables

    session = open_session(recipe, executor)
    with watch.watcher(as_json) as watcher:
        ended = run.run(session.context, session.executor, plan.Selection(**selected), watcher, wait)
    if ended.code:
        return ended.code
    planned = plan.make(session.context, plan.Selection(**{**selected, "force": False}))
    serving.point_compose(session.context.repo, planned)
    if not as_json:
        show(report.of_result(planned, ended.ran, ended.folder))
        for made in outcome.of_plan(session.context, planned):
            show(tables.of_outcome(made))
    return 0


@command(on_recipe=True)
def demo(recipe: str, executor: str | None) -> None:
    """The whole line, then a table of what it made and one exchange."""
    from forge import plan
    from product import EVALUATE, report

    if code := run_stages(recipe, executor, False, True):
        sys.exit(code)
    show(report.of_demo(plan.artifact(open_session(recipe, executor).context, EVALUATE).folder))


@command(
    as_json,
    click.option("--no-wait", is_flag=True, help="Exit if another run holds the store."),
    on_recipe=True,
)
def warm(recipe: str, executor: str | None, as_json: bool, no_wait: bool) -> None:
    """Compiles stage train's kernels for this GPU, and keeps them.

    The first run then starts as fast as every later one.
    """
    from forge import watch
    from product import report, warm

    session = open_session(recipe, executor)
    with watch.watcher(as_json) as watcher:
        kernels = warm.warm(session.context, session.executor, watcher, not no_wait)
    if kernels is None:
        sys.exit(1)
    print(json.dumps({"event": "warmed", **kernels})) if as_json else show(report.of_warm(kernels))


@command(click.argument("questions", nargs=-1, required=True, metavar="QUESTION..."), as_json)
def ask(recipe: str, executor: str | None, questions: tuple[str, ...], as_json: bool) -> None:
    """Asks the base, the tuned and the NVFP4 model each QUESTION."""
    from forge import watch
    from product import ask, report

    session = open_session(recipe, executor)
    with watch.watcher(as_json) as watcher:
        asked = ask.ask(session.context, session.executor, list(questions), watcher)
    if asked is None:
        sys.exit(1)
    for one in asked:
        print(json.dumps({"event": "asked", **one})) if as_json else show(report.of_asked(one))


@command(as_json, on_recipe=True)
def compare(recipe: str, executor: str | None, as_json: bool) -> None:
    """Trains and asks every variant of the recipe, in one table.

    Each is trained, merged, quantised and asked; then come one table with a verdict, and a picture.
    """
    from forge import modes, plan, run, watch
    from product import EVALUATE, compare, picture, report

    session = open_session(recipe, executor)
    variants = compare.variants(session.context)
    for name, context in variants.items():
        print(f"variant {name}", file=sys.stderr)
        with watch.watcher(as_json) as watcher:
            if code := run.run(context, session.executor, plan.Selection(last=EVALUATE), watcher).code:
                sys.exit(code)
    rows, picture_file = compare.rows(variants), home() / f"compare-{session.context.recipe.name}.svg"
    modes.write(
        picture_file,
        picture.svg(rows, f"{session.context.recipe.name}: what survives four bits", compare.verdict(rows)),
    )
    (
        print(json.dumps({"event": "compared", "variants": rows, "picture": str(picture_file)}))
        if as_json
        else show(report.of_compare(rows, picture_file))
    )


@command(on_stage, as_json)
def explain(stage: str, recipe: str, executor: str | None, as_json: bool) -> None:
    """What changed since STAGE was last built, from what to what."""
    from forge import plan, report

    explanation = plan.explain(open_session(recipe, executor).context, stage)
    if as_json:
        print(json.dumps(explanation.as_json(), indent=1))
    else:
        show(report.of_explanation(explanation))


@command(as_json, on_recipe=True)
def status(recipe: str, executor: str | None, as_json: bool) -> None:
    """The state of every stage, and of the run under way."""
    from forge import history, journal, lock, plan, progress, report, same_name, screen

    context = open_session(recipe, executor).context
    planned = plan.make(context)
    holder = lock.holder(context.store.root / "lock")
    folder = journal.under_way(home())
    now = progress.of_events(journal.events(folder)) if folder else None
    last = next(history.of_recipe(context.store, planned.recipe), None)
    if as_json:
        under_way = now.as_json(time.time()) if now else None
        state = {"running": holder, "progress": under_way, "last": last.as_json() if last else None}
        print(json.dumps({**planned.as_json(), **state}, indent=1))
        return
    newest = {s.name: context.store.newest(s.name, planned.recipe, planned.executor) for s in planned.stages}
    show(report.of_status(planned, newest, last))
    if now:
        show(screen.Now(now, lock.describe(holder) if holder else ""))
    elif holder:
        show(f"\na run is under way: {lock.describe(holder)}")
    if findings := same_name.findings(context):
        show(report.of_findings(findings), to_stderr=True)


@command(
    as_json,
    click.option("--all", "every", is_flag=True, help="Every question that was failed."),
    on_recipe=True,
)
def report(recipe: str, executor: str | None, as_json: bool, every: bool) -> None:
    """How good the built models are, and what to try."""
    from forge import plan
    from product import EVALUATE, outcome
    from product import report as tables

    context = open_session(recipe, executor).context
    plan.artifact(context, EVALUATE)
    made = list(outcome.of_plan(context, plan.make(context)))
    if as_json:
        print(json.dumps([each.as_json() for each in made], indent=1))
    for each in [] if as_json else made:
        show(tables.of_behaviour(each.folder))
        show(tables.of_outcome(each, len(each.failed) if every else 5))


@command(as_json, on_recipe=True, by_any=True)
def runs(recipe: str, executor: str | None, as_json: bool) -> None:
    """Earlier runs of the recipe: what each made and why, and what came out."""
    from product import difference_shown, report

    store, parsed, past = earlier_runs(recipe, executor)
    if as_json:
        print(json.dumps([run.as_json() for run in past], indent=1))
    else:
        show(report.of_runs(store, past))
        show(difference_shown.going_back(parsed.option)) if past else None


def earlier_runs(recipe: str, executor: str | None) -> tuple[Store, Recipe, list[PastRun]]:
    """The store, the recipe, and its runs by that executor or by any, newest first."""
    from forge import history
    from forge import recipe as recipes
    from forge.store import Store

    store, parsed = Store(home()), recipes.load(recipes.find(recipe, REPO), REPO)
    past = history.of_recipe(store, parsed.name)
    return store, parsed, [run for run in past if executor in (None, run.executor)]


@command(
    click.argument("then", required=False, metavar="[RUN]"),
    click.argument("now", required=False, metavar="[RUN]"),
    as_json,
    click.option("--all", "every", is_flag=True, help="Every row and every answer."),
    by_any=True,
)
def diff(
    recipe: str, executor: str | None, then: str | None, now: str | None, as_json: bool, every: bool
) -> None:
    """What differs between two runs: data, figures, answers and more.

    A RUN is named as `runs` shows it, or by the beginning of that. Default: the last two; of one, that one
    and the last.
    """
    from forge import history
    from product import difference, difference_shown

    store, parsed, past = earlier_runs(recipe, executor)
    pair = history.pair(past, then, now, parsed)
    differs = difference.of_runs(store, *pair, list(parsed.stages))
    if as_json:
        print(json.dumps(differs.as_json(), indent=1))
    else:
        show(difference_shown.of_difference(differs, every))
        show(difference_shown.going_back(parsed.option))


@command(
    on_stage,
    click.option("--follow", "-f", is_flag=True, help="Go on until the stage ends."),
    click.option("--run", default="", metavar="RUN", help="Of this run; see: build.py runs."),
    by_any=True,
)
def logs(stage: str, recipe: str, executor: str | None, follow: bool, run: str) -> None:
    """STAGE's newest log, by --executor or by any."""
    from forge import journal
    from forge import recipe as recipes

    parsed = recipes.load(recipes.find(recipe, REPO), REPO)
    for text in journal.read_log(home(), parsed, stage, follow, executor, run):
        print(text, end="", flush=True)


of_run = click.option("--run", metavar="RUN", help="As that run made or used it; see: build.py runs.")


@command(on_stage, of_run, says_so=False)
def path(stage: str, recipe: str, executor: str | None, run: str | None) -> None:
    """The folder of STAGE's artifact. Prints nothing else; exit 1 if it is not built."""
    from forge import history, plan

    if run:
        store, parsed, past = earlier_runs(recipe, None)
        print(history.artifact(store, history.find(past, run, parsed), stage).folder)
    else:
        print(plan.artifact(open_session(recipe, executor).context, stage).folder)


@command(click.argument("stages", nargs=-1, metavar="[STAGE]..."), as_json)
def verify(recipe: str, executor: str | None, stages: tuple[str, ...], as_json: bool) -> None:
    """Reads every byte of the artifacts, or of those of STAGE, and exits with 1 if one is not what it was."""
    from forge import plan, report, verify

    context = open_session(recipe, executor).context
    names = plan.Selection(only=stages).stages(context.recipe)
    with report.reading(verify.size(context, names)) as on_bytes:
        verdicts = verify.verify(context, names, on_bytes)
    findings = verify.findings(context, verdicts)
    if as_json:
        print(json.dumps({"stages": [verdict.as_json() for verdict in verdicts]}, indent=1))
    else:
        show(report.of_verdicts(verdicts))
    if findings:
        show(report.of_findings(findings), to_stderr=True)
        sys.exit(1)


keeping = click.option("--keep", default=3, show_default=True, type=click.IntRange(0), metavar="N")


@command(keeping, as_json, on_recipe=True)
def ls(recipe: str, executor: str | None, keep: int, as_json: bool) -> None:
    """What takes space, and which recipe uses it: artifacts, scratch, environments and images."""
    from forge import space

    session = open_session(recipe, executor)
    items, findings = space.items(session.context, session.executor, keep)
    show_items(items, findings, as_json, "in all", removed=False)


@command(
    keeping,
    click.option("--yes", is_flag=True, help="Remove it; else it is only listed."),
    as_json,
    on_recipe=True,
)
def gc(recipe: str, executor: str | None, keep: int, yes: bool, as_json: bool) -> None:
    """Removes what no recipe of this repository, no server and none of the last N runs of a recipe uses."""
    from forge import space

    session = open_session(recipe, executor)
    if yes:
        items, findings = space.remove(session.context, session.executor, keep)
    else:
        items, findings = space.items(session.context, session.executor, keep)
    unused = [item for item in items if not item.users]
    show_items(unused, findings, as_json, "removed" if yes else "to be removed with --yes", removed=yes)


def show_items(items: list[Any], findings: list[Any], as_json: bool, words: str, removed: bool) -> None:
    from forge import report

    if as_json:
        print(json.dumps({"removed": removed, "items": [item.as_json() for item in items]}, indent=1))
    else:
        show(report.of_items(items, words))
    if findings:
        show(report.of_findings(findings), to_stderr=True)


@command(as_json, on_recipe=True)
def doctor(recipe: str, executor: str | None, as_json: bool) -> None:
    """What this machine lacks for the recipe. Exit 1 if that stops it."""
    from forge import plan, report, run

    session = open_session(recipe, executor)
    planned = plan.make(session.context)
    findings = run.lacking(session.context, session.executor, planned)
    findings += modes.findings(home())
    if as_json:
        print(json.dumps([f.__dict__ for f in findings], indent=1))
    else:
        show(report.of_doctor(findings, planned))
    sys.exit(any(f.level == "error" for f in findings))


@command(
    click.argument("folder", type=click.Path(path_type=Path)),
    click.option(
        "--base",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="What it was made from: a sample of the packed weights has to fit it, the rest has to be equal.",
    ),
    click.option("--deep", is_flag=True, help="With --base: compares every packed weight, not a sample."),
    click.option(
        "--vllm",
        metavar="VERSION",
        help="Also what this vLLM cannot load, and the flags it needs (0.31.0; 0.32.0+cpu without a GPU).",
    ),
    as_json,
    says_so=False,
)
def audit(
    recipe: str,
    executor: str | None,
    folder: Path,
    base: Path | None,
    deep: bool,
    vllm: str | None,
    as_json: bool,
) -> None:
    """Checks the checkpoint in FOLDER, and exits with 1 on a fault.

    Every tensor, scale and exclude is looked at.
    """
    from product import audit, report

    session = open_session(recipe, executor)
    result = audit.audit(session.context, session.executor, folder, base, vllm, deep)
    print(json.dumps(result, indent=1)) if as_json else show(report.of_audit(result))
    sys.exit(bool(result["findings"]))


@cli.command()
@guarded
def schema() -> None:
    """The JSON Schema of recipes, for an editor."""
    from forge import schema

    print(json.dumps(schema.of_repository(REPO), indent=1, ensure_ascii=False))


KEY_FILE = click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    envvar="ANNIE_API_KEY_FILE",
    help="A file with the key that the server asks for.",
)


@command(
    click.option("--port", default=8000, show_default=True),
    click.option("--bind", default="127.0.0.1", show_default=True, help="The address to listen on."),
    KEY_FILE,
    click.option("--detach", is_flag=True, help="Leave it running and come back."),
    click.option("--stop", is_flag=True, help="Stop what is served."),
    of_run,
)
def serve(
    recipe: str,
    executor: str | None,
    port: int,
    bind: str,
    api_key_file: Path | None,
    detach: bool,
    stop: bool,
    run: str | None,
) -> None:
    """Serves the recipe's model on 127.0.0.1; on another address only with a key."""
    from forge import history
    from product import serving

    session, take = open_session(recipe, executor), None
    if run:
        store, parsed, past = earlier_runs(recipe, session.executor.name)
        take = partial(history.artifact, store, history.find(past, run, parsed))
    address = serving.Address(port, bind, api_key_file)
    sys.exit(serving.serve(session.context, session.executor, address, detach, stop, take))


@cli.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True)
@KEY_FILE
@click.argument("prompt", required=False)
@guarded
def chat(url: str, prompt: str | None, api_key_file: Path | None) -> None:
    """A chat with what is being served."""
    from product import chat

    sys.exit(chat.chat(url, prompt, api_key_file))


if __name__ == "__main__":
    os.umask(modes.umask())  # what stages, uv and vLLM write is private too
    for stream in (sys.stdout, sys.stderr):  # of a terminal that is not UTF-8: a ? for what it cannot show
        stream.reconfigure(errors="replace") if isinstance(stream, io.TextIOWrapper) else None
    cli()
