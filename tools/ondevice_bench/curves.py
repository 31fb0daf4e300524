"""Speed-up over density as a picture: a line for each method, its intervals, and what bytes alone would give."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ondevice_bench.sweep import Point

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 460, 60, 30, 50, 60
COLOURS = ("#4a7fb5", "#c0553b", "#4f9a5a", "#8a63a8", "#b58a2e", "#5a5a5a")
STYLE = "text{font:13px sans-serif;fill:#222}.axis{stroke:#222;stroke-width:1.5}.grid{stroke:#ddd}"


def svg(points: Sequence[Point], title: str) -> str:
    """Methods as lines with intervals; dashed, the speed-up if only bytes counted."""
    top = max(max(p.high, p.floor) for p in points) * 1.05
    frame = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(rows: float, speedup: float) -> tuple[float, float]:
        return round(LEFT + frame[0] * rows, 1), round(HEIGHT - BOTTOM - frame[1] * speedup / top, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">',
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="12" y="24">{escape(title)}</text>',
    ]
    for step in range(int(2 * top) + 1):
        x, y = place(0, step / 2)
        kind = "axis" if step in (0, 2) else "grid"
        parts.append(f'<line class="{kind}" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{step / 2:g}</text>')
    for tenth in range(0, 11, 2):
        x, y = place(tenth / 10, 0)
        parts.append(f'<text x="{x}" y="{y + 20}" text-anchor="middle">{10 * tenth} %</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">neurons that run; 1 = dense</text>')
    for i, name in enumerate(dict.fromkeys(p.sparsity for p in points)):
        colour, mine = COLOURS[i % len(COLOURS)], [p for p in points if p.sparsity == name]
        parts += _line([place(p.rows, p.floor) for p in mine], colour, dashed=True)
        parts += _line([place(p.rows, p.speedup) for p in mine], colour)
        for p in mine:
            (x, low), (_, high) = place(p.rows, p.low), place(p.rows, p.high)
            parts.append(f'<line class="interval" stroke="{colour}" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>')
        where = f'x="{WIDTH - RIGHT}" y="{TOP + 18 * i}" text-anchor="end"'
        parts.append(f'<text {where} style="fill:{colour}">{escape(name)} (dashed: bytes alone)</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(places: Sequence[tuple[float, float]], colour: str, dashed: bool = False) -> list[str]:
    path = " ".join(f"{x},{y}" for x, y in places)
    dashes = ' stroke-dasharray="5 4"' if dashed else ' stroke-width="2"'
    return [f'<polyline points="{path}" fill="none" stroke="{colour}"{dashes}/>']
