"""The data as a picture: how long the conversations are, how much of them is trained, and what they are about."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

INK, QUIET, FIRST, SECOND = "#1f2933", "#9aa5b1", "#2f6f9f", "#d98032"


def draw(path: Path, tokens: list[int], trained: list[int], categories: dict[str, int]) -> None:
    """Two histograms (tokens, trained tokens a conversation) and a bar for every category."""
    pyplot.rcParams.update({"font.size": 9, "axes.edgecolor": QUIET, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK})
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), width_ratios=(1, 1, 1.2), layout="constrained")
    share = sum(trained) / sum(tokens)
    for axis, values, color, title in (
        (axes[0], tokens, FIRST, f"{len(tokens)} conversations, {sum(tokens):,} tokens"),
        (axes[1], trained, SECOND, f"{sum(trained):,} tokens trained ({share:.1%})"),
    ):
        axis.hist(values, bins=min(30, max(5, len(set(values)))), color=color)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("tokens a conversation")
    axes[0].set_ylabel("conversations")
    names = sorted(categories, key=lambda name: categories[name])
    bars = axes[2].barh(names, [categories[n] for n in names], color=FIRST)
    axes[2].bar_label(bars, padding=3, fontsize=8)
    axes[2].set_title("conversations by category", loc="left", fontsize=10)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
