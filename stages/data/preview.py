"""Looks at the user's rows as stage data does, and makes no data set of them.

    python -m stages.data.preview job.json

This is no stage: it makes no artifact and is in no key. `build.py data` starts it with the parameters and
sources of stage data; of the base it needs tokenizer, template and config.json. `given.json` in the scratch
folder says which rows to show: `{"rows": ["FILE:LINE"], "first": how many of those that are trained}`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from model.families import tokens
from model.families.chat import Rendered
from model.labels import IGNORED
from stages import dataset, job
from stages.conversations.rows import Reject
from stages.data import prepare
from stages.data.prepare import REJECTS, Dataset, Prepared, RowsRefused
from stages.job import Job, StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOO_LONG = re.compile(rf"(\d+) tokens, {prepare.LONG} ")
_NUMBER = re.compile(r"\d+")


def run(task: Job) -> None:
    """Writes `preview.json` (docs/formats.md, What `build.py data` prints), and `rejects.jsonl` if there are
    rejects. What stage data would refuse is written too, and raises nothing.
    """
    asked = json.loads((task.scratch / "given.json").read_text())
    data, rejects, refused = _prepared(task)
    if rejects:
        dataset.write(task.output / REJECTS, map(asdict, rejects))
    tokenizer = functools.cache(lambda: tokens.load(task.inputs["base"]))
    found = [row for place in asked["rows"] for row in _at(place, data, rejects, tokenizer)]
    first = [_trained(item, "train", tokenizer) for item in (data.train if data else [])[: asked["first"]]]
    report = {
        "refused": refused,
        "counts": {k: v for k, v in data.summary.items() if k != "histograms"} if data else None,
        "reasons": reasons(rejects),
        "rows": found + first,
    }
    (task.output / "preview.json").write_text(json.dumps(report) + "\n")


def _prepared(task: Job) -> tuple[Dataset | None, list[Reject], dict[str, str] | None]:
    """The data set, the rejects, and why stage data would refuse them."""
    try:
        data = prepare.prepare(task)
    except StageError as error:
        refused = {"found": error.found, "expected": error.expected, "remedy": error.remedy}
        return None, error.rejects if isinstance(error, RowsRefused) else [], refused
    return data, data.rejects, None


def reasons(rejects: list[Reject]) -> list[dict[str, Any]]:
    """Why rows are rejected, the most frequent reason first. Reasons that differ only in numbers are one, in
    the words of the first row. `raise` has the parameter that is too low for them, and what it has to be.
    """
    groups: dict[str, list[Reject]] = {}
    for reject in rejects:
        groups.setdefault(_NUMBER.sub("", reject.reason), []).append(reject)
    return [
        {
            "reason": group[0].reason,
            "count": len(group),
            "file": group[0].file,
            "line": group[0].line,
            "raise": _raise(group),
        }
        for group in sorted(groups.values(), key=len, reverse=True)
    ]


def _raise(group: list[Reject]) -> dict[str, int]:
    lengths = [int(found[1]) for reject in group if (found := _TOO_LONG.match(reject.reason))]
    return {"max_tokens": max(lengths)} if lengths else {}


def _at(
    place: str,
    data: Dataset | None,
    rejects: list[Reject],
    tokenizer: Callable[[], PreTrainedTokenizerBase],
) -> Iterator[dict[str, Any]]:
    """What becomes of the row at FILE:LINE; of several, if the name fits several files. A row of a data set
    that is refused is known only if it is a reject.
    """
    name, _, number = place.rpartition(":")
    line, absent = int(number), data is not None
    for state, items in (("train", data.train), ("held out", data.held_out)) if data else ():
        for item in items:
            if item.row.line == line and is_named(item.row.file, name):
                absent = False
                yield _trained(item, state, tokenizer)
    for reject in rejects:
        if reject.line == line and is_named(reject.file, name):
            absent = False
            yield {"state": "rejected", **asdict(reject)}
    if absent:
        yield {"state": "absent", "file": name, "line": line}


def is_named(file: str, name: str) -> bool:
    """Whether `name` is the file's, with fewer or more of the folders above it: `call.jsonl` and
    `mine/conversations/call.jsonl` both name `conversations/call.jsonl`.
    """
    short, long = sorted((file, name.removeprefix("./")), key=len)
    return f"/{long}".endswith(f"/{short}")


def _trained(item: Prepared, state: str, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> dict[str, Any]:
    return {
        "state": state,
        "file": item.row.file,
        "line": item.row.line,
        "tokens": len(item.rendered.input_ids),
        "trained_tokens": item.rendered.trained,
        "pieces": pieces(tokenizer(), item.rendered),
    }


def pieces(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> list[dict[str, Any]]:
    """The text, cut where training begins and ends: `text` and whether it is `trained`."""
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    trained = [label != IGNORED for label in rendered.labels]
    begins = [
        number for number in range(len(trained)) if number == 0 or trained[number] != trained[number - 1]
    ]
    edges = [encoded["offset_mapping"][number][0] for number in begins] + [len(rendered.text)]
    return [
        {"text": rendered.text[edges[n] : edges[n + 1]], "trained": trained[number]}
        for n, number in enumerate(begins)
    ]


if __name__ == "__main__":
    job.main(run)
