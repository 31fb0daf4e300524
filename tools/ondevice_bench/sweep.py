"""Speed-up over density: methods at each of many densities, in turn with the dense shape."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ondevice_bench.loading import load_decoder
from ondevice_bench.measure import in_turn
from ondevice_bench.report import markdown
from ondevice_bench.traffic import held_bytes

if TYPE_CHECKING:
    from ondevice.spec import ModelSpec
    from ondevice_bench.cases import Case
    from ondevice_bench.loading import Progress, Source

DENSITIES = tuple(round(0.1 * i, 1) for i in range(1, 11))
LEAST_ROUNDS = 20
"""Turns from which on the interval of a median means something."""
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Point:
    """One method at one density.

    Args:
        sparsity: the method as it was asked for.
        rows: part of the FFN's neurons that was forced.
        speedup: median over turns of dense seconds / sparse seconds.
        low, high: 95 % confidence interval of that median, by bootstrap over the turns.
        floor: what it would be if only bytes counted, routers left out, and every layer skipped.
        dense_layers: how many the plan runs dense.
    """

    sparsity: str
    rows: float
    speedup: float
    low: float
    high: float
    floor: float
    dense_layers: int


def sweep(
    sources: Sequence[Source], backend: str, threads: int | None, case: Case, rounds: int, progress: Progress
) -> Iterator[Point]:
    """Points of each method, by ascending density.

    Args:
        sources: the dense shape, then the methods.
        backend, threads, progress: as of `ondevice.load`.
        rounds: turns of each pair.
    """
    dense = load_decoder(sources[0], backend, threads, [case], progress=progress)
    for source in sources[1:]:
        assert source.sparsity is not None
        for rows in DENSITIES:
            progress(0, 0, f"sweeping {source.sparsity.text} at {rows:g}")
            own = dataclasses.replace(source, sparsity=source.sparsity.at(rows))
            sparse = load_decoder(own, backend, threads, [case])
            of_dense, of_sparse = in_turn([dense, sparse], case, rounds, alike=True)
            ratios = [b / a for a, b in zip(of_dense.samples, of_sparse.samples)]
            skippable = held_bytes([layer.ffn for layer in dense.layers]) * _share(sparse.spec) / case.batch
            floor = of_dense.bytes_per_token / (of_dense.bytes_per_token - (1 - rows) * skippable)
            off = len(sparse.plan.dense_layers(sparse.spec))
            yield Point(source.sparsity.text, rows, statistics.median(ratios), *interval(ratios), floor, off)


def _share(spec: ModelSpec) -> float:
    """Part of an FFN's weights that can be skipped: all but what chooses, where that is a part of the FFN."""
    shapes = spec.tensors()
    matrices = {name: prod(shapes.get(f"layers.0.{name}.weight", (0,))) for name in ("gate", "up", "down")}
    chooses = spec.sparsity is not None and spec.sparsity.name == "spark"
    return 1 - matrices["gate"] / sum(matrices.values()) if chooses else 1.0


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the median of ratios that were measured in pairs."""
    drawn = np.random.default_rng(0).choice(np.asarray(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


def table(points: Sequence[Point]) -> str:
    """The points in Markdown."""
    rows = [
        {
            "sparsity": p.sparsity,
            "rows": f"{p.rows:.1f}",
            "speed-up": f"{p.speedup:.3f}",
            "95 % interval": f"{p.low:.3f} to {p.high:.3f}",
            "floor": f"{p.floor:.2f}",
            "dense layers": str(p.dense_layers),
        }
        for p in points
    ]
    return markdown(rows, left=("sparsity",))
