"""Densities within a budget."""

from __future__ import annotations

import itertools
import random

import pytest

from ondevice_convert.allocation import LayerChoices, allocate, interpolated

DENSITIES = (0.9, 0.7, 0.5)


def layer(costs: tuple[float, ...], gains: tuple[float, ...] = (0.1, 0.3, 0.5)) -> LayerChoices:
    return LayerChoices(DENSITIES, costs, gains)


def test_nothing_fits_and_everything_fits() -> None:
    layers = [layer((0.1, 0.2, 0.4)), layer((0.1, 0.2, 0.4))]
    assert allocate(layers, 0.05) == [1.0, 1.0]
    assert allocate(layers, 1.0) == [0.5, 0.5]
    assert allocate([], 1.0) == []


def test_layers_that_cost_less_skip_more() -> None:
    assert allocate([layer((0.1, 0.2, 0.4)), layer((0.01, 0.02, 0.04))], 0.15) == [0.9, 0.5]


def test_layers_where_skipping_does_not_pay_stay_dense() -> None:
    assert allocate([layer((0.0, 0.0, 0.0), (-0.1, 0.0, -0.2))], 1.0) == [1.0]
    # Only far down, and the way there is one step.
    assert allocate([layer((0.1, 0.2, 0.3), (-0.1, 0.0, 0.2))], 0.3) == [0.5]


def test_budgets_hold_and_are_near_the_best() -> None:
    draw = random.Random(0)
    for _ in range(50):
        layers = []
        for _ in range(4):
            costs = sorted(draw.random() for _ in DENSITIES)
            layers.append(layer(tuple(costs), tuple(sorted(draw.random() for _ in DENSITIES))))
        budget = draw.random() * 2

        def worth(densities: list[float], layers: list[LayerChoices] = layers) -> tuple[float, float]:
            places = [None if d == 1.0 else DENSITIES.index(d) for d in densities]
            picked = [(x.costs[p], x.gains[p]) for x, p in zip(layers, places) if p is not None]
            return sum(c for c, _ in picked), sum(g for _, g in picked)

        cost, gain = worth(allocate(layers, budget))
        every = [worth(list(d)) for d in itertools.product((1.0, *DENSITIES), repeat=4)]
        best = max(g for c, g in every if c <= budget)
        assert cost <= budget + 1e-12 and gain >= 0.6 * best


def test_ratios_between_measurements() -> None:
    ratios = {0.1: 0.4, 0.5: 0.8, 1.0: 1.2}
    assert interpolated(ratios, 0.3) == pytest.approx(0.6) and interpolated(ratios, 0.5) == 0.8
    assert interpolated(ratios, 0.05) == 0.4 and interpolated(ratios, 1.0) == 1.2
