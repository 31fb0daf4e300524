"""A line chart as an SVG written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 460, 64, 30, 50, 60
COLOURS = ("#4a7fb5", "#c0553b", "#4f9a5a", "#8a63a8", "#b58a2e", "#5a5a5a")
STYLE = "text{font:13px sans-serif;fill:#222}.axis{stroke:#222;stroke-width:1.5}.grid{stroke:#ddd}"
TICKS = (4, 9)
"""Fewest and most lines across."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line.

    Args:
        label: in the legend.
        points: (x, y), from left to right.
        intervals: (low, high) of each y; none where they are not known.
        dashed: the (x, y) of a dashed companion in the same colour.
    """

    label: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()
    dashed: Sequence[tuple[float, float]] = ()


def svg(lines: Sequence[Line], title: str, x_label: str, y_label: str, mark: float | None = None) -> str:
    """A chart whose axes hold all points.

    Args:
        lines: at least one point in all.
        title: above the chart.
        x_label, y_label: of the axes.
        mark: a y that gets a line of its own, such as 1 where ratios are drawn.
    """
    points = [point for line in lines for point in (*line.points, *line.dashed)]
    heights = [y for _, y in points] + [y for line in lines for pair in line.intervals for y in pair]
    xs, ys = _axis([x for x, _ in points]), _axis([*heights, *([] if mark is None else [mark])])

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - xs[0]) / (xs[-1] - xs[0]), (y - ys[0]) / (ys[-1] - ys[0])
        return round(LEFT + (WIDTH - LEFT - RIGHT) * across, 1), round(
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up, 1
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">',
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="12" y="24">{escape(title)}</text>',
    ]
    for y in ys:
        left, at = place(xs[0], y)
        kind = "axis" if y in (ys[0], mark) else "grid"
        parts.append(f'<line class="{kind}" x1="{left}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4}" text-anchor="end">{y:g}</text>')
    for x in xs:
        at, bottom = place(x, ys[0])
        parts.append(f'<text x="{at}" y="{bottom + 20}" text-anchor="middle">{x:g}</text>')
    middle = f"{escape(y_label)} over {escape(x_label)}"
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">{middle}</text>')
    for i, line in enumerate(lines):
        parts += _line(i, line, place)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axis(values: Sequence[float]) -> list[float]:
    """Round numbers from below the least to above the largest value."""
    low, high = min(values), max(values)
    low = min(low, 0.0) if low < 0.5 * high or low < 0 else low
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span))
    while span / step < TICKS[0]:
        step /= 2
    while span / step > TICKS[1]:
        step *= 2
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _line(i: int, line: Line, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    colour = COLOURS[i % len(COLOURS)]
    parts = [_path([place(*point) for point in line.dashed], colour, ' stroke-dasharray="5 4"')] if line.dashed else []
    parts.append(_path([place(*point) for point in line.points], colour, ' stroke-width="2"'))
    for (x, _), (low, high) in zip(line.points, line.intervals):
        (at, bottom), (_, top) = place(x, low), place(x, high)
        parts.append(f'<line class="interval" stroke="{colour}" x1="{at}" x2="{at}" y1="{bottom}" y2="{top}"/>')
    where = f'x="{WIDTH - RIGHT}" y="{TOP + 18 * i}" text-anchor="end"'
    return [*parts, f'<text {where} style="fill:{colour}">{escape(line.label)}</text>']


def _path(places: Sequence[tuple[float, float]], colour: str, style: str) -> str:
    path = " ".join(f"{x},{y}" for x, y in places)
    return f'<polyline points="{path}" fill="none" stroke="{colour}"{style}/>'
