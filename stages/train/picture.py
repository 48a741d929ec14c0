"""Draws the loss curve."""

from __future__ import annotations

from pathlib import Path

INK, ACCENT, PALE = "#22313f", "#d1495b", "#9fb4c7"


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without its start-up bias."""
    averages, mean, scale = [], 0.0, 0.0
    for value in values:
        mean, scale = weight * mean + (1 - weight) * value, weight * scale + (1 - weight)
        averages.append(mean / scale)
    return averages


def draw(train: dict[int, float], held_out: dict[int, float], drop: float | None, path: Path) -> None:
    """Draws training and held-out loss (nats per assistant token) over steps, on a logarithmic axis. `drop`
    is None if nothing was trained.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=144, layout="constrained")
    steps, losses = list(train), list(train.values())
    if train:
        axes.plot(steps, losses, color=PALE, linewidth=0.8)
        axes.plot(steps, smooth(losses), color=INK, linewidth=2, label="training")
    if held_out:
        axes.plot(
            list(held_out),
            list(held_out.values()),
            color=ACCENT,
            linewidth=1.5,
            marker="o",
            markersize=4,
            label="held out",
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per assistant token")
    axes.set_title(
        "Not trained" if drop is None else f"Loss fell by {drop:.0%}",
        loc="left",
        color=INK,
        fontweight="bold",
    )
    axes.grid(axis="y", which="both", color="#e6ebf0", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if train or held_out:
        axes.legend(frameon=False, loc="upper right")
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
