"""Draws the data: lengths of conversations, how much of them is trained, and their categories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

INK, QUIET, FIRST, SECOND = "#1f2933", "#9aa5b1", "#2f6f9f", "#d98032"
STYLE: Any = {
    "font.size": 9,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw(path: Path, stats: dict[str, Any]) -> None:
    """Draws two histograms (tokens and trained tokens per conversation) and a bar per category. `stats` is
    the content of stats.json.
    """
    with pyplot.rc_context(STYLE):
        categories = dict(sorted(stats["categories"].items(), key=lambda item: (item[1], item[0])))
        height = max(3.6, 1.2 + 0.24 * len(categories))
        figure, axes = pyplot.subplots(
            1, 3, figsize=(12, height), width_ratios=(1, 1, 1.2), layout="constrained"
        )
        conversations = stats["train"] + stats["eval"]
        for axis, name, color, title in (
            (axes[0], "tokens", FIRST, f"{conversations:,} conversations, {stats['tokens']:,} tokens"),
            (
                axes[1],
                "trained_tokens",
                SECOND,
                f"{stats['trained_tokens']:,} of them trained ({stats['trained_share']:.1%})",
            ),
        ):
            bins = stats["histograms"][name]
            axis.stairs(bins["counts"], bins["edges"], fill=True, color=color)
            axis.set_title(title, loc="left", fontsize=10)
            axis.set_xlabel(f"{name.replace('_', ' ')} a conversation")
        axes[0].set_ylabel("conversations")
        bars = axes[2].barh(list(categories), list(categories.values()), color=FIRST)
        axes[2].bar_label(bars, padding=3, fontsize=8)
        axes[2].set_title("conversations by category", loc="left", fontsize=10)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
