"""Speed-up over density as a picture: a line for each method, its intervals, and what bytes alone would give."""

from __future__ import annotations

from collections.abc import Sequence

from ondevice_bench import chart
from ondevice_bench.sweep import Point


def svg(points: Sequence[Point], title: str) -> str:
    """Methods as lines with intervals; dashed, the speed-up if only bytes counted."""
    lines = []
    for name in dict.fromkeys(p.sparsity for p in points):
        mine = [p for p in points if p.sparsity == name]
        lines.append(
            chart.Line(
                f"{name} (dashed: bytes alone)",
                [(p.rows, p.speedup) for p in mine],
                [(p.low, p.high) for p in mine],
                [(p.rows, p.floor) for p in mine],
            )
        )
    return chart.svg(lines, title, "part of the neurons that run", "speed-up, 1 = dense,", mark=1.0)
