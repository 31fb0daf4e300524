"""Gradient steps for small routers that were begun in closed form: Adam, stopped by samples of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Parameters = tuple[Floats, ...]
BATCH = 256
JUDGEMENTS = 20
"""Times that a descent is judged."""
PATIENCE = 6
"""Judgements in a row without progress after which it ends."""


def descend(
    start: Parameters,
    gradient: Callable[[Parameters, NDArray[np.int64]], Parameters],
    judge: Callable[[Parameters], float],
    n: int,
    steps: int,
    rate: float,
    seed: int = 0,
) -> Parameters:
    """Adam with a rate that falls to 0.

    Args:
        start: parameters to begin with; stay as they are.
        gradient: of the loss, for parameters and the numbers of a batch's samples.
        judge: loss on samples that no gradient sees.
        n: samples that gradients see.
        steps: at most; 0 returns the start.
        rate: of the first step.
        seed: of the batches.

    Returns:
        The parameters that were judged best, never worse than the start.

    Source: Kingma and Ba, Adam: a method for stochastic optimization (2015), algorithm 1.
    """
    random = np.random.default_rng(seed)
    now = [values.copy() for values in start]
    means, squares = ([np.zeros_like(values) for values in start] for _ in range(2))
    best, least, waited = start, judge(start), 0
    for step in range(1, steps + 1):
        rows = random.integers(0, n, min(BATCH, n))
        pace = np.float32(rate * (1 - (step - 1) / steps) * np.sqrt(1 - 0.999**step) / (1 - 0.9**step))
        for i, slope in enumerate(gradient(tuple(now), rows)):
            means[i] += np.float32(0.1) * (slope - means[i])
            squares[i] += np.float32(0.001) * (slope * slope - squares[i])
            now[i] -= pace * means[i] / (np.sqrt(squares[i]) + np.float32(1e-8))
        if step % max(1, steps // JUDGEMENTS) and step < steps:
            continue
        found = judge(tuple(now))
        waited += 1
        if found < least:
            best, least, waited = tuple(values.copy() for values in now), found, 0
        if waited == PATIENCE:
            break
    return best


@dataclass(frozen=True, slots=True)
class NormLoss:
    """Mean squared error of |second @ relu(first @ x)|, the router of D2DMoE.

    Args:
        x: inputs [n, d].
        y: targets [n, m].
    """

    x: Floats
    y: Floats

    def judge(self, parameters: Parameters) -> float:
        """Loss on all samples."""
        return float(((predicted_norms(self.x, *parameters) - self.y) ** 2).mean())

    def gradient(self, parameters: Parameters, rows: NDArray[np.int64]) -> Parameters:
        """Of the loss on some samples, by (first [w, d], second [m, w])."""
        first, second = parameters
        x = self.x[rows]
        before = x @ first.T
        hidden = np.maximum(before, 0)
        outputs = hidden @ second.T
        slopes = (np.abs(outputs) - self.y[rows]) * np.sign(outputs) * np.float32(2 / outputs.size)
        inner = slopes @ second * (before > 0)
        return inner.T @ x, slopes.T @ hidden


def predicted_norms(x: Floats, first: Floats, second: Floats) -> Floats:
    """What D2DMoE's router gives [n, m] for inputs [n, d]."""
    norms: Floats = np.abs(np.maximum(x @ first.T, 0) @ second.T)
    return norms


@dataclass(frozen=True, slots=True)
class LabelLoss:
    """Mean cross-entropy of sigmoid(weight @ x + bias), the router of LTE.

    Args:
        x: inputs [n, d].
        wanted: bool [n, m].
        weights: [n, m] of the terms, or 1.
    """

    x: Floats
    wanted: NDArray[np.bool_]
    weights: Floats | float = 1.0

    def judge(self, parameters: Parameters) -> float:
        """Loss on all samples."""
        weight, bias = parameters
        scores = self.x @ weight.T + bias
        return float((self.weights * np.logaddexp(0, np.where(self.wanted, -scores, scores))).mean())

    def gradient(self, parameters: Parameters, rows: NDArray[np.int64]) -> Parameters:
        """Of the loss on some samples, by (weight [m, d], bias [m])."""
        weight, bias = parameters
        x = self.x[rows]
        scores = np.clip(x @ weight.T + bias, -60, 60)
        slopes = 1 / (1 + np.exp(-scores)) - self.wanted[rows]
        weights = self.weights if isinstance(self.weights, float) else self.weights[rows]
        slopes = (slopes * weights / slopes.size).astype(np.float32)
        return slopes.T @ x, slopes.sum(axis=0)
