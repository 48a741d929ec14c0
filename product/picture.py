"""The variants of a recipe as a picture: an SVG, which any browser shows, made without a plotting library.

Above, a line for each variant: how many questions base, tuned, merged and NVFP4 model passed. Below, how the
error of four bits grows from layer to layer, a curve for each variant.
"""

from __future__ import annotations

import math
from typing import Any
from xml.sax.saxutils import escape

INK, ACCENT, PALE, LINE = "#22313f", "#d1495b", "#9fb4c7", "#e6ebf0"
# pixels: the names, the axis, a row, the least height of the curves
LEFT, WIDTH, ROW, CURVES = 150, 460, 38, 220
# pixels: title, verdict and legend; an axis' numbers and its name; from one panel to the next
HEAD, AXIS, GAP = 96, 48, 58
# Column, label, radius and look of a mark; each is drawn over those before it, smaller or hollow, so that
# marks in one place are all seen.
MARKS = (
    ("base", "base", 9, f'fill="{PALE}"'),
    ("tuned", "tuned", 12, f'fill="none" stroke="{INK}" stroke-width="1.5"'),
    ("merged", "merged", 7, f'fill="{INK}"'),
    ("nvfp4", "NVFP4", 5, f'fill="{ACCENT}"'),
)
VERDICTS = {"kept": "#2e7d32", "lost": ACCENT, "control": "#6b7785"}
COLOURS = ("#22313f", "#d1495b", "#1b7f9c", "#e08e1b", "#6a4c93", "#4f8f3a", "#9a6b4f", "#c2569b")
# of neighbours, the broken ones drawn over the whole, so that curves in one place are all seen
DASHES = ("none", "9 7", "2 6")
WORD = 7.6  # pixels of a letter, about


def svg(rows: list[dict[str, Any]], title: str, verdict: str) -> str:
    """An SVG document of `rows` (product/compare.py), with `verdict` below the title."""
    longest = WORD * max(len(row["variant"]) for row in rows)
    left = max(LEFT, 40 + longest)
    below = HEAD + ROW * len(rows) + AXIS
    errors = {row["variant"]: row["fidelity"]["layers"] for row in rows if row["fidelity"]}
    curves = _curves(errors, left, below + GAP) if errors else []
    height = below + (GAP + _height(errors) + AXIS if errors else 0) + 12
    # KL and verdict, or the legend of the curves
    width = max(left + WIDTH + 30 + max(190, longest + 130), 40 + WORD * len(verdict))
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}"'
                f' font-family="sans-serif" font-size="13" fill="{INK}">'
            ),
            '<rect width="100%" height="100%" fill="white"/>',
            _text(20, 30, title, 'font-size="16" font-weight="bold"'),
            _text(20, 52, verdict),
            *_questions(rows, left),
            *curves,
            "</svg>",
            "",
        ]
    )


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{style and " " + style}>{escape(text)}</text>'


def _circle(x: float, y: float, radius: int, look: str) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius}" {look}/>'


def _line(x1: float, x2: float, y1: float, y2: float, style: str = f'stroke="{LINE}"') -> str:
    return f'<line x1="{x1:g}" x2="{x2:g}" y1="{y1:g}" y2="{y2:g}" {style}/>'


def _questions(rows: list[dict[str, Any]], left: float) -> list[str]:
    """A row for each variant: a mark for each model at the share of questions that it passed, what four bits
    cost in KL, and the verdict.
    """
    parts, right, bottom = [], left + WIDTH, HEAD + ROW * len(rows)
    for column, (_, label, radius, look) in enumerate(MARKS):
        x = left + 110 * column
        parts += [_circle(x, 75, radius, look), _text(x + 18, 80, label)]
    parts.append(_text(right + 30, 80, "KL, nats a token"))
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = left + WIDTH * share
        parts += [_line(x, x, HEAD, bottom), _text(x, bottom + 18, f"{share:.0%}", 'text-anchor="middle"')]
    parts.append(_text(left + WIDTH / 2, bottom + 38, "questions passed", 'text-anchor="middle"'))
    for number, row in enumerate(rows):
        y = HEAD + ROW * number + ROW / 2
        places = {name: left + WIDTH * row["pass"][name] for name, *_ in MARKS if name in row["pass"]}
        parts.append(_text(left - 20, y + 4, row["variant"], 'text-anchor="end"'))
        parts.append(_line(places["merged"], places["nvfp4"], y, y, f'stroke="{ACCENT}" stroke-width="2"'))
        parts += [_circle(places[name], y, radius, look) for name, _, radius, look in MARKS if name in places]
        parts.append(
            _text(right + 30, y + 4, f"{row['fidelity']['kl']:.4f}" if row["fidelity"] else "not measured")
        )
        parts.append(
            _text(right + 125, y + 4, row["verdict"], f'font-weight="bold" fill="{VERDICTS[row["verdict"]]}"')
        )
    return parts


def _height(errors: dict[str, list[float]]) -> float:
    return max(CURVES, 24 * len(errors) + 24)  # as high as its legend


def _curves(errors: dict[str, list[float]], left: float, top: float) -> list[str]:
    """Relative error of the hidden states after each layer, a curve for each variant, over layers from 1; the
    legend in the order of the ends.
    """
    height, right, layers = _height(errors), left + WIDTH, max(map(len, errors.values()))
    step = _step(max(max(curve) for curve in errors.values()) / 4)
    steps = max(1, math.ceil(round(max(max(curve) for curve in errors.values()) / step, 6)))

    def point(layer: int, error: float) -> tuple[float, float]:
        return left + WIDTH * ((layer - 1) / (layers - 1) if layers > 1 else 0.5), top + height * (
            1 - error / (step * steps)
        )

    parts = [
        _text(
            20,
            top - 18,
            "Error after each layer: of the hidden states, as a share of their size",
            'font-weight="bold"',
        )
    ]
    for number in range(steps + 1):
        y = point(1, step * number)[1]
        parts += [
            _line(left, right, y, y),
            _text(
                left - 12,
                y + 4,
                f"{step * number:.{max(0, -math.floor(math.log10(step)) - 2)}%}",
                'text-anchor="end"',
            ),
        ]
    every = next(count for count in (1, 2, 5, 10, 20, 50, 100, layers) if layers / count <= 12)
    for layer in range(1, layers + 1):
        if layer == 1 or layer % every == 0:
            x = point(layer, 0)[0]
            parts += [
                _line(x, x, top + height, top + height + 4, f'stroke="{PALE}"'),
                _text(x, top + height + 18, str(layer), 'text-anchor="middle"'),
            ]
    parts.append(_text(left + WIDTH / 2, top + height + 38, "layer", 'text-anchor="middle"'))
    places = sorted(errors, key=lambda variant: -errors[variant][-1])
    for place, variant in sorted(enumerate(places), key=lambda item: item[0] % len(DASHES)):
        curve, colour = errors[variant], COLOURS[list(errors).index(variant) % len(COLOURS)]
        style = f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{DASHES[place % len(DASHES)]}"'
        points = " ".join(
            f"{x:.1f},{y:.1f}" for x, y in (point(layer, error) for layer, error in enumerate(curve, 1))
        )
        parts.append(f'<polyline points="{points}" fill="none" {style}/>')
        y = top + 24 * place + 12
        parts += [
            _line(right + 30, right + 54, y, y, style),
            _text(right + 62, y + 4, f"{variant}, {curve[-1]:.1%}"),
        ]
    return parts


def _step(least: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not below `least`; a hundredth where there is
    no error.
    """
    if not least:
        return 0.01
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))
