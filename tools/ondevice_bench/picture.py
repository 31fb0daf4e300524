"""Ratios as a picture: bars with error bars, an SVG written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ondevice_bench.ratios import Comparison

WIDTH, ROW, LABELS, MARGIN = 760, 34, 190, 60
STYLE = "text{font:13px sans-serif;fill:#222}.bar{fill:#4a7fb5}.error,.axis{stroke:#222;stroke-width:1.5}"


def svg(comparisons: Sequence[Comparison], title: str) -> str:
    """A horizontal bar per comparison, its length the ratio, with the spread of the rounds and a line at 1."""
    most = max(1.0, *(c.high for c in comparisons))
    height = MARGIN + ROW * len(comparisons) + 40

    def x(ratio: float) -> float:
        return round(LABELS + (WIDTH - LABELS - 2 * MARGIN) * ratio / most, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="12" y="28">{escape(title)}</text>',
    ]
    for i, c in enumerate(comparisons):
        parts += _bar(c, MARGIN + ROW * i, x(0), x(c.ratio), x(c.low), x(c.high))
    bottom = MARGIN + ROW * len(comparisons)
    parts.append(f'<line class="axis" x1="{x(1)}" x2="{x(1)}" y1="{MARGIN - 8}" y2="{bottom}"/>')
    parts.append(f'<text x="{x(1)}" y="{bottom + 20}" text-anchor="middle">1 = the peer</text></svg>')
    return "\n".join(parts) + "\n"


def _bar(c: Comparison, y: int, start: float, end: float, low: float, high: float) -> list[str]:
    middle = y + ROW / 2 - 3
    return [
        f'<text x="{start - 8}" y="{middle + 5}" text-anchor="end">{escape(label(c))}</text>',
        f'<rect class="bar" x="{start}" y="{y}" width="{round(end - start, 1)}" height="{ROW - 6}"/>',
        f'<line class="error" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>',
        *(f'<line class="error" x1="{e}" x2="{e}" y1="{middle - 4}" y2="{middle + 4}"/>' for e in (low, high)),
        f'<text x="{max(end, high) + 8}" y="{middle + 5}">{c.ratio:.2f}</text>',
    ]


def label(c: Comparison) -> str:
    """Test, and the condition where it is not a quiet machine."""
    return c.test if c.condition == "quiet" else f"{c.test}, {c.condition}"
