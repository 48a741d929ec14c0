"""Turns files of conversations into tokens and labels: find, read, check, render, mask, split, and report."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from model.families import calls, chat, tokens
from model.families.chat import Chat
from model.families.messages import ChatError
from model.weights.paths import CheckpointError
from stages import dataset, job
from stages.conversations import files, formats, rows, sent
from stages.conversations.rows import Reject, Row
from stages.data import picture, production, stats
from stages.data.parameters import Parameters
from stages.data.split import split
from stages.job import Job, StageError

# A smaller share of trained tokens gets a warning: such a run spends most of its time on reading prompts.
LITTLE = 0.05
SHOWN, SHOWN_REFUSED = 5, 20  # rejects that the log shows if the stage goes on, and if it stops
LONG = "max_tokens is"
REJECTS = "rejects.jsonl"


@dataclass(frozen=True)
class Prepared:
    """A row and its tokens."""

    row: Row
    rendered: chat.Rendered


@dataclass(frozen=True)
class Dataset:
    """What the artifact holds. `train` and `held_out` are in the order of the sources; `summary` is
    stats.json.
    """

    train: list[Prepared]
    held_out: list[Prepared]
    rejects: list[Reject]
    prompt: str
    tools: list[dict[str, Any]]
    summary: dict[str, Any]


class RowsRefused(StageError):
    """Too many rows are bad: the `rejects`."""

    def __init__(self, found: str, expected: str, remedy: str, rejects: list[Reject]):
        super().__init__(found, expected, remedy)
        self.rejects = rejects


def run(task: Job) -> None:
    """Writes the artifact `chat-dataset` (docs/formats.md). Raises StageError if a source cannot be used, or
    too many rows. All rejects are then in the scratch folder, which is not deleted.
    """
    try:
        data = prepare(task)
    except RowsRefused as refused:
        path = task.scratch / REJECTS
        dataset.write(path, map(asdict, refused.rejects))
        warn_of_rejects(refused.rejects[:SHOWN_REFUSED])
        remedy = f"{refused.remedy} All of them are in {path}."
        raise StageError(refused.found, refused.expected, remedy) from refused
    warn_of_rejects(data.rejects[:SHOWN], "all rejects are in rejects.jsonl")
    write(task.output, data)


def prepare(task: Job) -> Dataset:
    """The user's rows as tokens and labels. Raises RowsRefused for too many bad ones, and StageError if a
    source cannot be used.
    """
    params = task.parameters(Parameters)
    prompt = sent.read_prompt(task.sources["prompt"][0])
    tools = sent.read_tools(task.sources["tools"][0]) if task.sources.get("tools") else []
    listing = files.list_files(task.sources["conversations"])
    gathered = rows.gather(listing)
    unused = rows.unused_keys(gathered.rows)
    warn_of_sources(listing, unused)
    if not gathered.total:
        raise StageError(
            f"no rows in the sources{left_out_text(listing)}",
            "files with one conversation a line",
            "Check `sources.conversations` in the recipe.",
        )
    if not gathered.rows:  # else all rejects are named at once, with those that cannot be rendered
        refuse_many(gathered.rejects, gathered.total, params.max_reject_share)
    chosen, prompts = production.with_prompt(
        gathered.rows, prompt, params.missing_prompt, params.other_prompts
    )
    chosen, equipped = production.with_tools(chosen, tools, params.tools)
    chosen, thinking = apply_reasoning_policy(chosen, params.reasoning)
    chosen, duplicates, overlap = rows.without_duplicates(chosen)
    undeclared = undeclared_calls(chosen, params.undeclared_calls)
    chat_format = chat.of_folder(task.inputs["base"])
    try:
        tokenizer = tokens.load(task.inputs["base"])
        prepared, refused = render(
            chat_format, tokenizer, chosen, params.max_tokens, params.reasoning == "train"
        )
    except CheckpointError as error:
        raise StageError(error.found, error.expected, error.remedy) from error
    rejects = gathered.rejects + refused
    refuse_many(rejects, gathered.total, params.max_reject_share)
    train, held_out = split(prepared, params.eval_share)
    if not train:
        raise RowsRefused(
            f"no row left to train on: {len(rejects)} rejected, {len(held_out)} held out",
            "at least one",
            "Check max_tokens and eval_share.",
            rejects,
        )
    counts = {
        "duplicates": duplicates,
        "overlap": overlap,
        **prompts,
        **equipped,
        "reasoning": thinking,
        "undeclared_calls": undeclared,
        "splits": {f.name: f.split for f in listing.files if f.split},
        "left_out": listing.left_out,
        "unused_keys": unused,
    }
    summary = stats.summary(pairs(train), pairs(held_out), rejects, prompt, counts)
    if summary["trained_share"] < LITTLE:
        job.warning(
            f"only {summary['trained_share']:.1%} of the tokens are trained",
            "shorten the system prompt, or leave out tools that a conversation does not need",
        )
    return Dataset(train, held_out, rejects, prompt, tools, summary)


def pairs(prepared: list[Prepared]) -> list[tuple[Row, chat.Rendered]]:
    """Each row with its tokens, as stats.summary takes them."""
    return [(p.row, p.rendered) for p in prepared]


def warn_of_sources(listing: files.Listing, unused: dict[str, int]) -> None:
    """Warns of files that are not read, of the data set's own held-out split, and of unused keys."""
    if listing.left_out:
        job.warning(
            f"{len(listing.left_out)} files are not read{left_out_text(listing)}",
            "name a file itself in `sources.conversations` to have it read",
        )
    if splits := [f"{file.name} ({file.split})" for file in listing.files if file.split]:
        job.warning(
            f"held out, by their names: {files.joined_names(splits)}",
            "eval_share then holds out nothing more; to train on a file, name it itself in"
            " `sources.conversations`, not its folder",
        )
    if unused:
        job.warning(
            "keys that are not used: "
            + files.joined_names((f"{k} ({count} rows)" for k, count in unused.items()), 8),
            "docs/formats.md says which are",
        )


def left_out_text(listing: files.Listing) -> str:
    """The files left out and their reasons, as the end of a sentence."""
    return (
        ": " + files.joined_names(f"{name} {reason}" for name, reason in listing.left_out.items())
        if listing.left_out
        else ""
    )


def apply_reasoning_policy(chosen: list[Row], policy: str) -> tuple[list[Row], int]:
    """The rows, without their reasoning unless the policy is train, and the number of rows that have some."""
    thinking = sum(any("reasoning_content" in message for message in row.messages) for row in chosen)
    if not thinking or policy == "train":
        return chosen, thinking
    job.warning(
        f"{thinking} of {len(chosen)} rows have reasoning, which is left out",
        "Annie is served with thinking off; set reasoning: train to train it",
    )
    return [
        replace(
            row,
            messages=[
                {k: v for k, v in message.items() if k != "reasoning_content"} for message in row.messages
            ],
        )
        for row in chosen
    ], thinking


def undeclared_calls(chosen: list[Row], policy: str) -> dict[str, int]:
    """Reason -> number of rows with calls that the row's tools do not allow. Raises StageError if there are
    any and the policy is refuse.
    """
    places: list[str] = []
    reasons: Counter[str] = Counter()
    for row in chosen:
        if faults := calls.mismatches(row.messages, row.tools):
            places.append(row.place)
            reasons.update({re.sub(r"^message \d+:? ", "", reason) for reason in faults})
    if places:
        kinds = files.joined_names((f"{reason}: {count} rows" for reason, count in reasons.most_common()), 5)
        text = (
            f"{len(places)} of {len(chosen)} rows have calls that their tools do not allow, "
            f"first {places[0]} ({kinds})"
        )
        if policy == "refuse":
            raise StageError(
                text,
                "calls of declared tools with arguments of their schema",
                "Mend the rows or their tools, or set undeclared_calls: warn to train them as they are.",
            )
        job.warning(text, "they are trained as they are; set undeclared_calls: refuse to stop here")
    return dict(reasons.most_common())


def render(
    chat_format: Chat,
    tokenizer: PreTrainedTokenizerBase,
    chosen: list[Row],
    limit: int,
    reasoning: bool,
) -> tuple[list[Prepared], list[Reject]]:
    """The rows as tokens. Rows that cannot be trained on become rejects."""
    prepared, rejects = [], []
    for number, row in enumerate(chosen, 1):
        try:
            rendered = chat_format.render(tokenizer, row.messages, row.tools, reasoning)
            reason = ""
        except ChatError as error:
            reason = str(error)
        except RecursionError:
            reason = "nested too deeply"
        else:
            if len(rendered.input_ids) > limit:
                reason = f"{len(rendered.input_ids)} tokens, {LONG} {limit}"
            elif not rendered.trained:
                reason = "no token to train on"
        if reason:
            rejects.append(Reject(row.file, row.line, reason, row.head))
        else:
            prepared.append(Prepared(row, rendered))
        if number % 50 == 0 or number == len(chosen):
            job.progress(number, len(chosen), "row")
    return prepared, rejects


def refuse_many(rejects: list[Reject], total: int, share: float) -> None:
    """Raises RowsRefused if more than `share` of the rows are rejects."""
    if len(rejects) <= share * total:
        return
    reasons = Counter(r.reason for r in rejects).most_common(3)
    first = rejects[0]
    remedy = "Mend or remove them, or raise max_reject_share if you mean to lose them"
    if any(LONG in reject.reason for reject in rejects):
        remedy += ", or max_tokens for the long ones"
    remedy += "."
    if any(reject.reason.startswith((formats.NO_FORMAT, "not JSON")) for reject in rejects):
        remedy += " A row is read in one of these forms:\n" + "\n".join(formats.SHAPES) + "\n"
    raise RowsRefused(
        f"{len(rejects)} of {total} rows are bad ({'; '.join(f'{n} x {reason}' for reason, n in reasons)}),"
        f" first {first.file}:{first.line}",
        f"at most {share:.1%}",
        remedy,
        rejects,
    )


def warn_of_rejects(rejects: list[Reject], remedy: str = "") -> None:
    """Prints each of them as a warning."""
    for reject in rejects:
        job.warning(f"{reject.file}:{reject.line} rejected: {reject.reason}", remedy)


def write(output: Path, data: Dataset) -> None:
    """Writes the artifact's files."""
    dataset.write(output / "train.jsonl", map(json_row, data.train))
    dataset.write(output / "eval.jsonl", map(json_row, data.held_out))
    dataset.write(output / REJECTS, map(asdict, data.rejects))
    (output / "prompt.txt").write_text(data.prompt + "\n", encoding="utf-8")
    (output / "tools.json").write_text(json.dumps(data.tools, indent=2) + "\n")
    (output / "stats.json").write_text(json.dumps(data.summary, indent=2) + "\n")
    picture.draw(output / "tokens.png", data.summary)
    for name in ("train", "eval", "rejected", "duplicates", "trained_share"):
        job.metric(name, data.summary[name])


def json_row(item: Prepared) -> dict[str, Any]:
    """A row of train.jsonl and eval.jsonl."""
    row, rendered = item.row, item.rendered
    return {
        "id": row.digest[:16],
        "category": row.category,
        "file": row.file,
        "line": row.line,
        "messages": row.messages,
        "tools": row.tools or [],
        "text": rendered.text,
        "input_ids": rendered.input_ids,
        "labels": rendered.labels,
    }
