"""Cases of selections, and what they must give, in NumPy and float64. Knows nothing of any platform."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
Mask = NDArray[np.bool_]

SIZES = (0, 1, 7, 33, 63, 64, 65, 96, 1536)
BATCHES = (1, 2, 7, 32)


def _with(x: Rows, value: float, every: int) -> Rows:
    x = x.copy()
    x.reshape(-1)[::every] = value
    return x


def _normal(r: np.random.RandomState, shape: tuple[int, int]) -> Rows:
    return r.randn(*shape).astype(np.float32)


SCORES: dict[str, Callable[[np.random.RandomState, tuple[int, int]], Rows]] = {
    "normal": _normal,
    "ties": lambda r, s: r.randint(-2, 3, s).astype(np.float32),
    "all equal": lambda r, s: np.full(s, 0.25, np.float32),
    "both zeros": lambda r, s: np.where(r.rand(*s) < 0.5, 0.0, -0.0).astype(np.float32),
    "all negative": lambda r, s: -np.abs(_normal(r, s)) - 1,
    "mostly zero": lambda r, s: np.maximum(_normal(r, s) - 1, 0),
    "zeros and tiny": lambda r, s: (r.randint(-2, 3, s) * 1e-45).astype(np.float32),
    "neighbouring floats": lambda r, s: (-1 - r.randint(0, 4, s) * 2.0**-23).astype(np.float32),
    "neighbours of zero": lambda r, s: np.where(r.rand(*s) < 0.03, -1e-45, 0.0).astype(np.float32),
    "minus infinity": lambda r, s: _with(_normal(r, s), -np.inf, 3),
    "infinity": lambda r, s: _with(_normal(r, s), np.inf, 5),
    "one huge": lambda r, s: _with(_normal(r, s), 3e38, 100_000),
    "every magnitude": lambda r, s: (_normal(r, s) * 10.0 ** r.uniform(-40, 38, s)).astype(np.float32),
    "NaN": lambda r, s: _with(_normal(r, s), np.nan, 4),
    "all NaN": lambda r, s: np.full(s, np.nan, np.float32),
}
"""Scores by what is odd about them."""


def scores(name: str, rows: int, units: int, seed: int = 0) -> Rows:
    return SCORES[name](np.random.RandomState(seed), (rows, units))


def top_k(x: NDArray[np.floating], k: int) -> Mask:
    """The k largest of each row, of equal ones the first; NaN below all."""
    x = x.astype(np.float64)
    # Sorted by minus the score: NaN is last either way, and a stable sort keeps the first of equals first.
    order = np.argsort(-x, axis=1, kind="stable")
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, order[:, : max(k, 0)], True, axis=1)
    return mask


def shared_top_k(x: Rows, k: int) -> Mask:
    """[1, M]: the k largest sums over rows of what is above 0; NaN has no vote. Added in order, in float32."""
    total = np.zeros(x.shape[1], np.float32)
    for row in x:
        total += np.where(row > 0, row, np.float32(0))
    return top_k(total[None], k)


def heads(x: Rows, k: int, group: int) -> Mask:
    """The k groups of adjacent heads with the largest score in them; NaN only counts if all are."""
    grouped = x.reshape(len(x), -1, group)
    best = np.where(np.isnan(grouped), -np.inf, grouped).max(axis=2)
    best[np.isnan(grouped).all(axis=2)] = np.nan
    return top_k(best, k)


def threshold(x: Rows, limit: float) -> Mask:
    with np.errstate(invalid="ignore"):
        return x.astype(np.float64) > np.float32(limit)


def magnitude(x: Rows, limit: float) -> Mask:
    return threshold(np.abs(x), limit)


def relative_threshold(x: Rows, share: float) -> Mask:
    """At least `share` of the row's largest, as a float32, and what equals the largest in any case."""
    with np.errstate(invalid="ignore", over="ignore"):
        peak = np.where(np.isnan(x), -np.inf, x).max(axis=1, keepdims=True, initial=-np.inf)
        limit = np.float32(share) * peak
        return (x >= np.where(limit <= peak, limit, peak)) & ~np.isnan(x)


def statistical_top_k(x: Rows, factor: float) -> NDArray[np.float64]:
    """What each score has above mean + factor * population deviation of its row, at least 0; 0 for NaN."""
    x = x.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        limit = x.mean(axis=1, keepdims=True) + factor * x.std(axis=1, keepdims=True)
        return np.nan_to_num(np.maximum(x - limit, 0), nan=0.0, posinf=np.inf)


def expanded(mask: Mask, block: int, neurons: int) -> Mask:
    return np.repeat(mask, block, axis=1)[:, :neurons]


def entries(mask: Mask) -> list[tuple[int, list[int]]]:
    """Of the union of a mask's rows the groups of 32 with a selected unit: number, and these units."""
    chosen = np.flatnonzero(mask.any(axis=0))
    return [(int(g), chosen[chosen // 32 == g].tolist()) for g in np.unique(chosen // 32)]
