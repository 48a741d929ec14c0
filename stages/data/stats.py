"""The content of `stats.json`."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter
from typing import Any

from model.families.chat import Rendered
from stages.conversations.rows import Reject, Row


def summary(
    train: list[tuple[Row, Rendered]],
    held_out: list[tuple[Row, Rendered]],
    rejects: list[Reject],
    prompt: str,
    counts: dict[str, Any],
) -> dict[str, Any]:
    """`counts` and all statistics of the rows. Shares are shares of tokens. `lowest_trained_share` and
    `median_trained_share` are over conversations.
    """
    all_rows = [*train, *held_out]
    lengths = [len(rendered.input_ids) for _, rendered in all_rows]
    trained = [rendered.trained for _, rendered in all_rows]
    shares = [part / whole for part, whole in zip(trained, lengths, strict=False)]
    return {
        "train": len(train),
        "eval": len(held_out),
        "rejected": len(rejects),
        **counts,
        "tokens": sum(lengths),
        "trained_tokens": sum(trained),
        "trained_share": round(sum(trained) / sum(lengths), 4),
        "lowest_trained_share": round(min(shares), 4),
        "median_trained_share": round(statistics.median(shares), 4),
        "longest": max(lengths),
        "median_length": round(statistics.median(lengths)),
        "histograms": {"tokens": histogram(lengths), "trained_tokens": histogram(trained)},
        "categories": _count(row.category for row, _ in all_rows),
        "held_out_categories": _count(row.category for row, _ in held_out),
        "files": _count(row.file for row, _ in all_rows),
        "formats": _count(row.format for row, _ in all_rows),
        "reasons": dict(Counter(r.reason for r in rejects).most_common()),
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
    }


def histogram(values: list[int], most_bins: int = 30) -> dict[str, list[int]]:
    """Counts in bins of equal whole width. `edges` has one entry more than `counts`; a bin includes its lower
    edge.
    """
    low, high = min(values), max(values)
    width = max(1, math.ceil((high - low + 1) / most_bins))
    counts = [0] * ((high - low) // width + 1)
    for value in values:
        counts[(value - low) // width] += 1
    return {"edges": [low + width * n for n in range(len(counts) + 1)], "counts": counts}


def _count(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
