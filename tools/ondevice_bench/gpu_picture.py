"""Time over density, and decoding over batch size, as a picture: an SVG written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, GAP = 960, 320, 56, 56, 70
PANEL = (WIDTH - LEFT - 2 * GAP - 20) // 3
COLOURS = {"ours": "#4a7fb5", "dense torch": "#c0553b", "floor": "#5a5a5a"}
STYLE = "text{font:12px sans-serif;fill:#222}.axis{stroke:#222}.grid{stroke:#ddd}"
Line = tuple[str, str, list[tuple[float, float]]]
"""Name, colour, points."""


def svg(results: dict[str, Any]) -> str:
    """Three panels: attention, FFN rows of a batch, and the speed-up of decoding; those without figures stay empty."""
    machine = results["machine"]
    height = HEIGHT + TOP + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="12" y="20">{escape(machine["device"])}, torch {escape(machine["torch"])}, '
        f"triton {escape(machine['triton'])}</text>",
    ]
    for i, (what, title) in enumerate(
        (("attention", "attention, ms over density"), ("rows of a batch", "FFN, ms over density"))
    ):
        mine = [r for r in results.get("layers", []) if r.get("what") == what and "density" in r]
        lines: list[Line] = [
            (name, COLOURS[name], [(r["density"], r[key]) for r in mine])
            for name, key in (("ours", "ms"), ("dense torch", "dense_ms"), ("floor", "floor_ms"))
        ]
        parts += _panel(i, title, lines, [f"{x / 5:g}" for x in range(6)], 1.0)
    decode = results.get("decode", [])
    points = [(float(j), r["speedup"]) for j, r in enumerate(decode)]
    names = [str(r["batch"]) for r in decode]
    title = "decoding, speed-up over batch size"
    parts += _panel(2, title, [("polar", COLOURS["ours"], points)], names, float(max(1, len(decode) - 1)))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(number: int, title: str, lines: Sequence[Line], names: Sequence[str], most: float) -> list[str]:
    left = LEFT + number * (PANEL + GAP)
    top = max([y for _, _, points in lines for _, y in points], default=1.0) * 1.08 or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return round(left + PANEL * x / most, 1), round(TOP + HEIGHT * (1 - y / top), 1)

    parts = [f'<text x="{left}" y="{TOP - 12}">{escape(title)}</text>']
    for i in range(5):
        x, y = place(0, top * i / 4)
        kind = "axis" if i == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x + PANEL}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{top * i / 4:.3g}</text>')
    for i, name in enumerate(names):
        x, y = place(most * i / max(1, len(names) - 1), 0)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{escape(name)}</text>')
    for i, (name, colour, points) in enumerate(lines):
        path = " ".join("{},{}".format(*place(x, y)) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        where = f'x="{left + 8}" y="{TOP + 16 + 16 * i}"'
        parts.append(f'<text {where} style="fill:{colour}">{escape(name)}</text>')
    return parts
