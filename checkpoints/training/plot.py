"""Draw the loss curves as one small SVG.

python plot.py --work state --out ../zimage-nano/loss.svg
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 300, 180, 34
INK = "#3b6ea8"


def panel(title: str, points: list[tuple[float, float]], left: int, unit: str) -> str:
    """Return a curve on a logarithmic axis as SVG elements."""
    xs, ys = [p[0] for p in points], [math.log10(max(p[1], 1e-6)) for p in points]
    low, high = min(ys), max(ys)
    span_x, span_y = max(xs) or 1, (high - low) or 1
    inner_w, inner_h = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def place(x: float, y: float) -> tuple[float, float]:
        return left + MARGIN + x / span_x * inner_w, MARGIN + (high - y) / span_y * inner_h

    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*p) for p in zip(xs, ys, strict=True)))
    bottom, x0 = HEIGHT - MARGIN, left + MARGIN
    text = 'font-family="sans-serif" font-size="10" fill="#555"'
    return (
        f'<text x="{x0}" y="20" font-family="sans-serif" font-size="12" fill="#222">{title}</text>'
        f'<rect x="{x0}" y="{MARGIN}" width="{inner_w}" height="{inner_h}" fill="none" '
        'stroke="#ccc"/>'
        f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.2"/>'
        f'<text x="{x0 - 4}" y="{MARGIN + 8}" text-anchor="end" {text}>{10**high:.2g}</text>'
        f'<text x="{x0 - 4}" y="{bottom}" text-anchor="end" {text}>{10**low:.2g}</text>'
        f'<text x="{x0 + inner_w}" y="{bottom + 14}" text-anchor="end" {text}>'
        f"{max(xs):,.0f} {unit}</text>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    curves = json.loads((arguments.work / "curves.json").read_text())
    vaes = json.loads((arguments.work / "vaes.json").read_text())["curves"]
    joint = [p for p in curves["joint"] if "samples" in p]
    panels = [
        ("tiny VAE", [(p["s"], p["tiny"]) for p in vaes["joint"] if p["whole"]], "s"),
        ("full VAE", [(p["s"], p["full"]) for p in vaes["joint"] if p["whole"]], "s"),
        ("captions' attributes", [(p["s"], p["loss"]) for p in curves["text"]], "s"),
        ("flow matching", [(p["samples"], p["flow"]) for p in joint], "samples"),
    ]
    body = "".join(panel(t, p, WIDTH * i, unit) for i, (t, p, unit) in enumerate(panels))
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{body}</svg>\n'
    arguments.out.write_text(svg, "utf-8")


if __name__ == "__main__":
    main()
