"""Cases of the selectors: `select_topk`, `select_threshold` and `statistical_topk`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice_parity.check import Home, Outcome, Table, close, same_lists


def _strided(array: NDArray[Any], home: Home) -> Any:
    """The same values with other numbers between them, in both directions."""
    wide = np.full((array.shape[0] * 2, array.shape[1] * 3), np.nan, array.dtype)
    wide[::2, 1::3] = array
    return home.array(wide)[::2, 1::3]


@dataclass(frozen=True)
class TopkCase:
    """The k largest of scores that are multiples of 1/8, so that many are equal and sums are exact.

    Args:
        normal: scores are normal values instead, hardly any of which are equal.
        below: scores are all negative.
    """

    n: int
    units: int
    k: int
    shared: bool = False
    group: int = 1
    strided: bool = False
    odd: bool = False
    zeros: bool = False
    active: bool = False
    dtype: str = "float32"
    span: int = 100
    normal: bool = False
    below: bool = False

    def __call__(self, fn: Callable[..., Any], rng: np.random.Generator, home: Home) -> Outcome:
        scores = (rng.integers(-self.span, self.span, (self.n, self.units * self.group)) / 8).astype(self.dtype)
        if self.normal:
            scores = rng.standard_normal(scores.shape).astype(self.dtype)
        if self.below:
            scores = -np.abs(scores) - 1
        if self.odd and scores.size:
            scores[:, :: self.units // 3 or 1] = np.nan
            scores[:, 1::2] = np.where(scores[:, 1::2] == 1, -0.0, scores[:, 1::2])
            scores[0, -1] = np.inf
            scores[-1, 0] = -np.inf
        if self.zeros:
            # Most are zeros of both signs, which are equal, and the k-th largest is one of them.
            scores = np.where(rng.random(scores.shape) < 0.1, 1, np.copysign(0, scores)).astype(self.dtype)
        active = rng.random(self.n) < 0.5 if self.active else None
        values = scores.astype(np.float64)
        if self.shared:
            voting = values if active is None else values[active]
            values = np.maximum(voting, 0).sum(axis=0, keepdims=True)
        values = np.where(np.isnan(values), -np.inf, values).reshape(len(values), self.units, self.group).max(axis=2)
        mask = np.zeros(values.shape, bool)
        np.put_along_axis(mask, np.argsort(-values, axis=1, kind="stable")[:, : self.k], True, axis=1)
        tensor = _strided(scores, home) if self.strided else home.array(scores)
        flags = None if active is None else home.array(active)
        unsure = None
        if self.odd:
            # NaN and -inf are both the smallest; which of them come first is not promised.
            unsure = values == -np.inf
        return same_lists(home, fn(tensor, self.k, self.shared, self.group, flags), mask, unsure)


@dataclass(frozen=True)
class ThresholdCase:
    """Scores of few different values, so that some are on the threshold."""

    n: int
    units: int
    threshold: float
    relative: bool = False
    strided: bool = False
    dtype: str = "float32"

    def __call__(self, fn: Callable[..., Any], rng: np.random.Generator, home: Home) -> Outcome:
        scores = (rng.integers(-20, 21, (self.n, self.units)) / 4).astype(self.dtype)
        if self.relative:
            scores = np.abs(scores)
        if self.n > 2:
            scores[0], scores[1] = -9, 9
        if self.relative and self.units > 1000:
            # The largest is in the first block alone.
            scores[-1, 0] = 99
        values = scores.astype(np.float64)
        largest = values.max(axis=1, keepdims=True) if self.n else values
        mask = (values >= self.threshold * largest) | (values == largest) if self.relative else values > self.threshold
        tensor = _strided(scores, home) if self.strided else home.array(scores)
        return same_lists(home, fn(tensor, self.threshold, self.relative), mask)


@dataclass(frozen=True)
class StatisticalCase:
    """Normal scores on a mean that is large beside their deviation."""

    n: int
    units: int
    part: float
    mean: float = 0.0
    strided: bool = False
    equal: bool = False

    def __call__(self, fn: Callable[..., Any], rng: np.random.Generator, home: Home) -> Outcome:
        scores = (rng.standard_normal((self.n, self.units)) + self.mean).astype(np.float32)
        if self.equal:
            scores[:] = 2.0
        c = NormalDist().inv_cdf(1 - self.part)
        values = scores.astype(np.float64)
        deviation = values.std(axis=1, keepdims=True)
        border = values.mean(axis=1, keepdims=True) + c * deviation
        tensor = _strided(scores, home) if self.strided else home.array(scores)
        got, rows = fn(tensor, c)
        unsure = np.abs(values - border) < 1e-4 * (1 + abs(self.mean))
        expected = np.maximum(values - border, 0)
        result = home.numpy(got)
        if result.shape != expected.shape or not np.isfinite(result).all():
            return Outcome(float("inf"), 0.0)
        chosen = same_lists(home, rows, values > border, unsure)
        if not chosen.passed:
            return chosen
        result = np.where(unsure, 0, result)
        # All values share a scale; the extra column keeps it where nothing is above the border.
        extra = np.ones((self.n, 1))
        both = [np.concatenate([x, extra], 1) for x in (result, np.where(unsure, 0, expected))]
        outcome = close(both[0], both[1], "float32")
        return Outcome(outcome.error, outcome.tolerance * (1 + abs(self.mean)))


CASES: Table = {
    "select_topk": {
        "one unit": TopkCase(1, 1, 1),
        "one of 7": TopkCase(3, 7, 1),
        "all of 33": TopkCase(7, 33, 33),
        "many equal": TopkCase(3, 257, 100, span=3),
        "all equal": TopkCase(2, 300, 7, span=1),
        "negative": TopkCase(3, 33, 5, below=True),
        "negative, many equal": TopkCase(3, 80, 40, below=True, span=3),
        "normal": TopkCase(3, 1000, 333, normal=True),
        "several blocks": TopkCase(2, 9001, 1234),
        "several blocks, normal": TopkCase(2, 9001, 4000, normal=True),
        "several blocks, negative": TopkCase(1, 8300, 60, normal=True, below=True),
        "several blocks, the first": TopkCase(2, 8193, 1, normal=True),
        "several blocks, all": TopkCase(1, 16385, 16385, span=2),
        "several blocks, groups of 2, strided": TopkCase(2, 8200, 700, group=2, strided=True),
        "equal across blocks": TopkCase(2, 9001, 4400, span=3),
        "zeros of both signs": TopkCase(3, 200, 100, zeros=True),
        "infinities, NaN, both zeros": TopkCase(4, 99, 40, odd=True),
        "no token": TopkCase(0, 9, 3),
        "strided": TopkCase(3, 70, 9, strided=True),
        "groups of 4": TopkCase(3, 8, 3, group=4),
        "groups of 3, strided": TopkCase(2, 21, 5, group=3, strided=True),
        "float16": TopkCase(3, 64, 20, dtype="float16"),
        "shared": TopkCase(7, 333, 50, shared=True),
        "shared, strided": TopkCase(33, 40, 5, shared=True, strided=True),
        "shared, several blocks": TopkCase(3, 8777, 3000, shared=True),
        "shared, some finished": TopkCase(9, 300, 60, shared=True, active=True),
    },
    "select_threshold": {
        "one unit": ThresholdCase(1, 1, 0.0),
        "none, all, some": ThresholdCase(7, 33, 1.0),
        "several blocks": ThresholdCase(3, 9001, 2.25),
        "strided": ThresholdCase(3, 70, 0.5, strided=True),
        "float16": ThresholdCase(3, 129, -1.0, dtype="float16"),
        "no token": ThresholdCase(0, 9, 0.5),
        "relative": ThresholdCase(7, 33, 0.5, relative=True),
        "relative, all": ThresholdCase(5, 7, 0.0, relative=True),
        "relative, the largest": ThresholdCase(5, 64, 1.0, relative=True),
        "relative, several blocks": ThresholdCase(3, 5000, 0.75, relative=True, strided=True),
    },
    "statistical_topk": {
        "one unit": StatisticalCase(2, 1, 0.5),
        "7 units": StatisticalCase(3, 7, 0.3),
        "33 units": StatisticalCase(7, 33, 0.08),
        "several blocks": StatisticalCase(2, 13824, 0.08),
        "a large mean": StatisticalCase(3, 5000, 0.05, mean=100.0),
        "all equal": StatisticalCase(2, 65, 0.1, equal=True),
        "strided": StatisticalCase(4, 300, 0.5, strided=True),
        "most": StatisticalCase(3, 1000, 0.9, mean=-3.0),
        "no token": StatisticalCase(0, 9, 0.5),
    },
}
