"""Which rows are held out: those of the data set's own split, or a share of each category."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

from stages import job
from stages.conversations.files import joined_names
from stages.conversations.rows import Row


class HasRow(Protocol):
    @property
    def row(self) -> Row: ...


T = TypeVar("T", bound=HasRow)


def split(items: Sequence[T], share: float) -> tuple[list[T], list[T]]:
    """Rows to train on and held-out rows, each in the given order.

    If some rows are of the data set's own held-out split, exactly those are held out. Else it is `share` of
    all rows, rounded, but at least one. Each category gives its part: the rows with the lowest digests, so
    the order of files does not matter. If rows are added, the old ones stay on their side, except for a few
    that keep the share constant.
    """
    if any(item.row.split for item in items):
        return [i for i in items if not i.row.split], [i for i in items if i.row.split]
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(item.row.category, []).append(item)
    counts = quotas({category: len(group) for category, group in groups.items()}, share)
    held_out_ids: set[int] = set()
    for category, group in groups.items():
        held_out_ids |= {id(item) for item in sorted(group, key=lambda i: i.row.digest)[: counts[category]]}
    if share:
        _warn(groups, counts, share)
    return [i for i in items if id(i) not in held_out_ids], [i for i in items if id(i) in held_out_ids]


def quotas(sizes: dict[str, int], share: float) -> dict[str, int]:
    """The number of rows that each category holds out: its share rounded down, and one more for the
    categories with the largest remainders until the total is reached.

    The total is `share` of all rows, rounded, and at least one if there are two or more rows. Among equal
    remainders the smaller category is first. A category's only row is held out last, because nothing of its
    kind would be trained.
    """
    total = sum(sizes.values())
    exact = {category: share * size for category, size in sizes.items()}
    counts = {category: math.floor(value + 1e-9) for category, value in exact.items()}
    held_out_total = min(total - 1, max(1, round(share * total))) if share and total else 0
    order = sorted(sizes, key=lambda c: (sizes[c] == 1, -round(exact[c] - counts[c], 9), sizes[c], c))
    for category in order[: max(0, held_out_total - sum(counts.values()))]:
        counts[category] += 1
    return counts


def _warn(groups: dict[str, list[T]], counts: dict[str, int], share: float) -> None:
    """Warns if no row, or no row of a category, is held out, and if a category's only row is held out."""
    if not any(counts.values()):
        job.warning(
            f"nothing is held out: eval_share {share} of {sum(map(len, groups.values()))} rows",
            "there will be no held-out loss; add rows",
        )
        return
    if empty := sorted(category for category in groups if not counts[category]):
        job.warning(
            f"eval_share {share} holds out nothing of {len(empty)} of {len(groups)} categories:"
            f" {joined_names(empty)}",
            "the held-out loss says nothing of them; raise eval_share, or file their rows under fewer"
            " categories",
        )
    if emptied := sorted(category for category in groups if counts[category] == len(groups[category])):
        job.warning(
            f"the only row of a category is held out: {joined_names(emptied)}",
            "it is not trained; lower eval_share, or add rows",
        )
