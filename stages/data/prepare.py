"""From files of conversations to tokens and labels: merge, check, render, mask, split, and say what was found."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import statistics
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoTokenizer

from nemotron import chat
from stages import dataset, job
from stages.data import picture
from stages.data.rows import Reject, Row, files, read
from stages.job import Job, StageError

LITTLE = 0.05  # a share of trained tokens that is worth a warning: most of such a run is spent on reading prompts


@dataclass(frozen=True)
class Prepared:
    row: Row
    rendered: chat.Rendered


def run(its: Job) -> None:
    prompt = its.sources["prompt"][0].read_text().strip()
    tools = json.loads(its.sources["tools"][0].read_text()) if its.sources.get("tools") else []
    rows, rejects, duplicates = merge(files(its.sources["conversations"]))
    total = len(rows) + len(rejects) + duplicates
    if not total:
        raise StageError("no rows in the sources", "JSONL files with one conversation a line", "Check `sources.conversations` in the recipe.")
    others = compare_prompts(rows, prompt, its.params["other_prompts"])
    tokenizer = AutoTokenizer.from_pretrained(its.inputs["base"])
    prepared, refused = render(tokenizer, rows, its.params["max_tokens"])
    rejects += refused
    dataset.write(its.output / "rejects.jsonl", [asdict(r) for r in rejects])
    for reject in rejects[:5]:
        job.warning(f"{reject.file}:{reject.line} rejected: {reject.reason}", "all rejects are in rejects.jsonl")
    refuse_many(rejects, total, its.params["max_reject_share"])
    train, held_out = split(prepared, its.params["eval_share"])
    if not train:
        raise StageError("no row left to train on", "at least one", "See the reasons in the log; check max_tokens and eval_share.")
    dataset.write(its.output / "train.jsonl", [line(p) for p in train])
    dataset.write(its.output / "eval.jsonl", [line(p) for p in held_out])
    (its.output / "prompt.txt").write_text(prompt + "\n")
    (its.output / "tools.json").write_text(json.dumps(tools, indent=2) + "\n")
    stats = summary(train, held_out, rejects, duplicates=duplicates, other_prompts=others, prompt=prompt)
    (its.output / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    picture.draw(its.output / "tokens.png", stats)
    if stats["trained_share"] < LITTLE:
        job.warning(f"only {stats['trained_share']:.1%} of the tokens are trained", "shorten the system prompt, or leave out tools that a conversation does not need")
    for name in ("train", "eval", "rejected", "duplicates", "trained_share"):
        job.metric(name, stats[name])


def merge(paths: dict[str, Path]) -> tuple[list[Row], list[Reject], int]:
    """Rows of all files in order, rejects, and how many exact duplicates were left out."""
    rows, rejects, seen, duplicates = [], [], set(), 0
    for number, (name, path) in enumerate(paths.items(), 1):
        for found in read(name, path):
            if isinstance(found, Reject):
                rejects.append(found)
            elif found.content in seen:
                duplicates += 1
            else:
                seen.add(found.content)
                rows.append(found)
        job.progress(number, len(paths), "file", f"{len(rows)} rows")
    return rows, rejects, duplicates


def compare_prompts(rows: list[Row], prompt: str, policy: str) -> int:
    """The prompt of training has to be the prompt of production: a model trained under a stale one misbehaves under the new.

    Returns how many rows have another one. Raises StageError with a diff, unless the recipe allows them.
    """
    others = Counter(row.prompt.strip() for row in rows if row.prompt.strip() != prompt)
    if not others:
        return 0
    worst, count = others.most_common(1)[0]
    example = next(row for row in rows if row.prompt.strip() == worst)
    diff = "\n".join(difflib.unified_diff(prompt.splitlines(), worst.splitlines(), "production", f"{example.file}:{example.line}", lineterm="", n=1))
    found = f"{sum(others.values())} of {len(rows)} rows with {len(others)} other system prompts; the most common ({count} rows) differs so:\n{diff}"
    if policy == "refuse":
        raise StageError(found, "the production prompt in every row", "Rewrite the rows' system prompt, name the right prompt file, or set other_prompts: allow.")
    job.warning(found, "other_prompts: allow is set; these rows are trained as they are")
    return sum(others.values())


def render(tokenizer, rows: list[Row], limit: int) -> tuple[list[Prepared], list[Reject]]:
    """Rows as tokens; those that cannot be trained on become rejects."""
    prepared, rejects = [], []
    for number, row in enumerate(rows, 1):
        try:
            rendered = chat.render(tokenizer, row.messages, row.tools)
            reason = ""
        except chat.ChatError as error:
            reason = str(error)
        else:
            if len(rendered.input_ids) > limit:
                reason = f"{len(rendered.input_ids)} tokens, the limit is {limit}"
            elif not rendered.trained:
                reason = "no token to train on"
        if reason:
            rejects.append(Reject(row.file, row.line, reason, row.head))
        else:
            prepared.append(Prepared(row, rendered))
        if number % 50 == 0 or number == len(rows):
            job.progress(number, len(rows), "row")
    return prepared, rejects


def refuse_many(rejects: list[Reject], total: int, share: float) -> None:
    if len(rejects) <= share * total:
        return
    reasons = Counter(r.reason for r in rejects).most_common(3)
    first = rejects[0]
    raise StageError(
        f"{len(rejects)} of {total} rows are bad ({'; '.join(f'{n} x {reason}' for reason, n in reasons)}), first {first.file}:{first.line}",
        f"at most {share:.1%}", "Mend or remove them, or raise max_reject_share if you mean to lose them.")


def split(prepared: list[Prepared], share: float) -> tuple[list[Prepared], list[Prepared]]:
    """Train and held-out rows: in each category the share with the lowest hashes, whatever the order of the files.

    New rows leave every old one on its side, but for the few at the border that keep the share what it is.
    """
    groups: dict[str, list[Prepared]] = {}
    for item in prepared:
        groups.setdefault(item.row.category, []).append(item)
    held: set[int] = set()
    for items in groups.values():
        ranked = sorted(items, key=lambda p: hashlib.sha256(p.row.content.encode()).hexdigest())
        held |= {id(p) for p in ranked[: round(share * len(items))]}
    return [p for p in prepared if id(p) not in held], [p for p in prepared if id(p) in held]


def line(item: Prepared) -> dict:
    row, rendered = item.row, item.rendered
    return {
        "id": hashlib.sha256(row.content.encode()).hexdigest()[:16], "category": row.category, "file": row.file, "line": row.line,
        "messages": row.messages, "tools": row.tools or [], "text": rendered.text, "input_ids": rendered.input_ids, "labels": rendered.labels,
    }


def summary(train: list[Prepared], held_out: list[Prepared], rejects: list[Reject], duplicates: int, other_prompts: int, prompt: str) -> dict:
    """What `stats.json` says. Shares are of tokens; `lowest_` and `median_trained_share` are over conversations."""
    both = [*train, *held_out]
    lengths = [len(p.rendered.input_ids) for p in both]
    trained = [p.rendered.trained for p in both]
    shares = [part / whole for part, whole in zip(trained, lengths)]
    return {
        "train": len(train), "eval": len(held_out), "rejected": len(rejects), "duplicates": duplicates, "other_prompts": other_prompts,
        "tokens": sum(lengths), "trained_tokens": sum(trained), "trained_share": round(sum(trained) / sum(lengths), 4),
        "lowest_trained_share": round(min(shares), 4), "median_trained_share": round(statistics.median(shares), 4),
        "longest": max(lengths), "median_length": round(statistics.median(lengths)),
        "histograms": {"tokens": histogram(lengths), "trained_tokens": histogram(trained)},
        "categories": dict(sorted(Counter(p.row.category for p in both).items())),
        "files": dict(sorted(Counter(p.row.file for p in both).items())),
        "reasons": dict(Counter(r.reason for r in rejects).most_common()),
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
    }


def histogram(values: list[int], most: int = 30) -> dict[str, list[int]]:
    """Counts in bins of equal whole width; `edges` has one entry more than `counts`, and a bin holds its lower edge."""
    low, high = min(values), max(values)
    width = max(1, math.ceil((high - low + 1) / most))
    counts = [0] * ((high - low) // width + 1)
    for value in values:
        counts[(value - low) // width] += 1
    return {"edges": [low + width * n for n in range(len(counts) + 1)], "counts": counts}
