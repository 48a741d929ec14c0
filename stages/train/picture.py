"""Draws the loss curves."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from stages.train.verdict import nats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, ACCENT, PALE, GRID = "#22313f", "#c0392b", "#9fb4c7", "#e6ebf0"
SIZE = 9.5  # points, of all text but the title
WIDE = 5  # losses whose largest is more than this many times the smallest get a logarithmic axis
APART = 0.06  # least distance of two labels at the right end, as a share of the height


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without its start-up bias."""
    averages, mean, scale = [], 0.0, 0.0
    for value in values:
        mean, scale = weight * mean + (1 - weight) * value, weight * scale + (1 - weight)
        averages.append(mean / scale)
    return averages


def draw(
    train: dict[int, float],
    held_out: dict[int, float],
    kept: int,
    epochs: float,
    title: str,
    path: Path,
) -> None:
    """Draws training and held-out losses, in nats for each trained token, by step. Step `kept` is marked.

    `epochs` is how often each conversation was trained in all steps.
    """
    import matplotlib
    import numpy

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    with matplotlib.rc_context({"font.size": SIZE, "axes.edgecolor": INK, "text.color": INK}):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=144, layout="constrained")
        ends: list[tuple[str, float, str]] = []  # what stands at the right end: text, loss, colour
        if train:
            averages = smooth(list(train.values()))
            axes.plot(list(train), list(train.values()), color=PALE, linewidth=0.8)
            axes.plot(list(train), averages, color=INK, linewidth=2)
            ends.append((f"training {nats(averages[-1])}", averages[-1], INK))
        if held_out:
            losses = list(held_out.values())
            axes.plot(list(held_out), losses, color=ACCENT, linewidth=1.5, marker="o", markersize=4)
            ends.append((f"held out {nats(losses[-1])}", losses[-1], ACCENT))
        if train:
            _mark(axes, held_out, kept)
        _losses_axis(axes, [*train.values(), *held_out.values()])
        _label_ends(axes, ends)
        axes.margins(x=0.02)
        if not train:  # one point, of which an axis cannot tell what a step is
            axes.set_xlim(-1, 1)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats for each trained token")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if train and epochs:
            ratio = max(train) / epochs
            top = axes.secondary_xaxis(
                "top",
                functions=(
                    lambda step: numpy.asarray(step) / ratio,
                    lambda epoch: numpy.asarray(epoch) * ratio,
                ),
            )
            top.set_xlabel("epoch")
            top.spines["top"].set_color(PALE)
        figure.suptitle(textwrap.fill(title, 88), x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.savefig(path, metadata={"Software": None})
        pyplot.close(figure)


def _mark(axes: Axes, held_out: dict[int, float], kept: int) -> None:
    """A vertical line at the step whose adapter is kept, named on the side that has more room."""
    left = 2 * kept > max(held_out, default=kept)
    text = f"kept: step {kept}" + (f", {nats(held_out[kept])}" if kept in held_out else "")
    axes.axvline(kept, color=ACCENT, linewidth=1, linestyle=":")
    axes.annotate(
        text,
        (kept, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(-6 if left else 6, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        color=ACCENT,
    )


def _losses_axis(axes: Axes, losses: list[float]) -> None:
    """A linear axis for losses of about one size, else a logarithmic one; both with numbers at any range."""
    from matplotlib import ticker

    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    if low > 0 and high > WIDE * low:
        axes.set_yscale("log")
        decades = high / low
        digits = (1, 2, 5) if decades < 1e3 else (1, 3) if decades < 1e5 else (1,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=digits, numticks=99))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())


def _label_ends(axes: Axes, ends: list[tuple[str, float, str]]) -> None:
    """Writes each curve's name and last loss beside its right end; close ones are moved apart."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    last = -1.0
    for text, loss, colour in sorted(ends, key=lambda end: end[1]):
        last = max(to_axes.transform((0, loss))[1], last + APART)
        axes.text(1.01, last, text, transform=axes.transAxes, va="center", color=colour)
