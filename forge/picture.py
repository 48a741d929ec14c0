"""The ways of a recipe as a picture: an SVG that any browser shows, for a host without a plotting library."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

INK, ACCENT, PALE, LINE = "#22313f", "#d1495b", "#9fb4c7", "#e6ebf0"
LEFT, WIDTH, RIGHT, ROW, TOP, BOTTOM = 150, 460, 170, 38, 74, 64  # pixels: the names, the axis, the figures; a row; title and legend
MARKS = (("base", "base", PALE), ("merged", "merged, BF16", INK), ("nvfp4", "NVFP4", ACCENT))


def ways(rows: list[dict[str, Any]], title: str) -> str:
    """An SVG document with a line for each way: the share of questions that base, merged and NVFP4 model passed, and the KL that four bits cost."""
    height, right = TOP + ROW * len(rows) + BOTTOM, LEFT + WIDTH
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right + RIGHT}" height="{height}" font-family="sans-serif" font-size="13" fill="{INK}">',
        f'<rect width="100%" height="100%" fill="white"/><text x="20" y="30" font-size="16" font-weight="bold">{escape(title)}</text>',
    ]
    for column, (_, label, colour) in enumerate(MARKS):
        x = LEFT + 150 * column
        parts.append(f'<circle cx="{x}" cy="51" r="6" fill="{colour}"/><text x="{x + 12}" y="56">{label}</text>')
    parts.append(f'<text x="{right + 30}" y="56">KL, nats a token</text>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = LEFT + WIDTH * share
        parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{height - BOTTOM}" stroke="{LINE}"/><text x="{x}" y="{height - BOTTOM + 20}" text-anchor="middle">{share:.0%}</text>')
    parts.append(f'<text x="{LEFT + WIDTH / 2}" y="{height - 18}" text-anchor="middle">questions passed</text>')
    for number, row in enumerate(rows):
        y = TOP + ROW * number + ROW / 2
        places = {name: LEFT + WIDTH * row["pass"][name] for name, _, _ in MARKS}
        parts.append(f'<text x="{LEFT - 20}" y="{y + 4}" text-anchor="end">{escape(row["way"])}</text>')
        parts.append(f'<line x1="{places["merged"]:g}" x2="{places["nvfp4"]:g}" y1="{y}" y2="{y}" stroke="{ACCENT}" stroke-width="2"/>')
        # The last is drawn over the others: smaller, so that marks in one place are all seen.
        parts += [f'<circle cx="{places[name]:g}" cy="{y}" r="{size}" fill="{colour}"/>' for (name, _, colour), size in zip(MARKS, (8, 8, 5), strict=True)]
        kl = f"{row['fidelity']['kl']:.4f}" if row["fidelity"] else "not measured"
        parts.append(f'<text x="{right + 30}" y="{y + 4}">{kl}</text>')
    return "\n".join([*parts, "</svg>", ""])
