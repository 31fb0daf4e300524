"""Pictures of a report: what each layer keeps, how good its choices are, and quality over bytes."""

from __future__ import annotations

from collections.abc import Sequence

from ondevice_bench import chart
from ondevice_convert.budget import Point
from ondevice_convert.fitted import LayerFit


def layers_svg(layers: Sequence[LayerFit]) -> str:
    """Density, recall and the share of the oracle's benefit of each layer."""
    lines = [
        chart.Line("kept", [(fit.layer, fit.density) for fit in layers]),
        chart.Line("recall of the wanted ones", [(fit.layer, fit.recall) for fit in layers]),
        chart.Line("share of the oracle's benefit", [(fit.layer, fit.oracle_share) for fit in layers]),
    ]
    return chart.svg(lines, "Each layer on samples that nothing was fitted on", "layer", "part")


def recall_svg(layers: Sequence[LayerFit]) -> str:
    """Recall against the density that it cost, a point for each layer."""
    points = sorted((fit.density, fit.recall) for fit in layers)
    return chart.svg([chart.Line("a point for each layer", points)], "Recall against density", "density", "recall")


def curve_svg(curve: Sequence[Point]) -> str:
    """Rise of perplexity over the bytes of a token."""
    points = sorted((point.speed.bytes_per_token / 1e6, 100 * point.quality.rise) for point in curve)
    title = "Quality against bytes: all layers at one density"
    return chart.svg(
        [chart.Line("single neurons", points)], title, "MB of a token", "rise of perplexity in %", mark=0.0
    )
