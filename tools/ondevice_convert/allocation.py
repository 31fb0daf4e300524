"""Which density each layer gets, within a budget of quality: the most time saved for the KL divergence added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

DENSE = 1.0


@dataclass(frozen=True, slots=True)
class LayerChoices:
    """What a layer may keep, and what that costs and gains; beside them it may run dense, at no cost and no gain.

    Args:
        densities: parts of its neurons, descending.
        costs: KL divergence, nats, of each.
        gains: time saved at each, in any unit that all layers share; not above 0 where skipping does not pay.
    """

    densities: Sequence[float]
    costs: Sequence[float]
    gains: Sequence[float]


def allocate(layers: Sequence[LayerChoices], budget: float) -> list[float]:
    """A density for each layer; costs are taken to add up.

    Greedy: again and again the step, of any layer to any of its lower densities, that saves the most time for each nat
    it adds and still fits.

    Args:
        layers: their choices.
        budget: of all costs, nats.
    """
    taken: list[int | None] = [None] * len(layers)
    left = budget
    while True:
        best: tuple[float, int, int, float] | None = None
        for i, layer in enumerate(layers):
            now = taken[i]
            cost, gain = (0.0, 0.0) if now is None else (layer.costs[now], layer.gains[now])
            for j in range(0 if now is None else now + 1, len(layer.densities)):
                more, saved = layer.costs[j] - cost, layer.gains[j] - gain
                if saved > 0 and more <= left:
                    value = saved / max(more, 1e-12)
                    if best is None or value > best[0]:
                        best = value, i, j, more
        if best is None:
            return [DENSE if j is None else layer.densities[j] for layer, j in zip(layers, taken)]
        _, i, j, more = best
        taken[i], left = j, left - more


def interpolated(ratios: dict[float, float], density: float) -> float:
    """A time ratio at a density, between those that were measured."""
    known = sorted(ratios)
    if density <= known[0]:
        return ratios[known[0]]
    for low, high in pairwise(known):
        if density <= high:
            share = (density - low) / (high - low)
            return ratios[low] + share * (ratios[high] - ratios[low])
    return ratios[known[-1]]
