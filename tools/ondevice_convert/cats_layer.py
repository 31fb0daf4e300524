"""A layer's FFN on samples, as CATS looks at it: what thresholds on one factor of its neurons keep and lose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ondevice.checkpoint.base import Checkpoint
from ondevice.sparsity.threshold import FACTORS
from ondevice_convert.fitted import LayerFit
from ondevice_convert.held_out import Floats, apart
from ondevice_convert.judged import cut_off
from ondevice_convert.neurons import Neurons
from ondevice_convert.samples import Samples

PUBLISHED = "published"
BEST = "best"
FIRSTS = (BEST, *FACTORS, PUBLISHED)
SAMPLES = 3072
"""That a layer is looked at on: a threshold is one number out of millions of magnitudes."""
LOOKED_AT = 512
"""Samples that a curve of losses is computed on."""


class CatsLayer:
    """The FFN of a layer with its factors on samples.

    Args:
        base: the dense model; the layer's tensors are read and released.
        samples: with the place "ffn".
        layer: its number.
    """

    def __init__(self, base: Checkpoint, samples: Samples, layer: int) -> None:
        self.layer, self.neurons = layer, Neurons.of(base, layer)
        fitted_on, held_out = apart(samples, "ffn", layer, base.spec.d_ff, SAMPLES)
        self._fit, self._held_out = (self._factors(x) for x in (fitted_on, held_out))
        reach = self.neurons.reach
        self.weights: dict[str, Floats] = {
            first: (reach * np.sqrt(np.square(self._fit[other]).mean(axis=0))).astype(np.float32)
            for first, other in zip(FACTORS, FACTORS[::-1])
        }
        """By first factor float32 [D]: what a magnitude of 1 gives on average."""

    def _factors(self, x: Floats) -> dict[str, Floats]:
        with np.errstate(over="ignore"):  # exp(-x) of a silu that is 0
            return dict(zip(FACTORS, self.neurons.factors(x)))

    def _sizes(self, first: str, factors: dict[str, Floats]) -> Floats:
        if first == PUBLISHED:
            return np.abs(factors["gate"])
        return np.abs(factors[first]) * self.weights[first]

    def lost(self, first: str, densities: Sequence[float]) -> list[float]:
        """Part of the output's square that is lost at each of several densities, on some of the samples.

        Args:
            first: one of FIRSTS; "best" takes for each density what loses less.
            densities: above 0, up to 1.
        """
        if first == BEST:
            return [min(both) for both in zip(*(self.lost(factor, densities) for factor in FACTORS))]
        step = max(1, len(self._fit["up"]) // LOOKED_AT)
        some = {name: values[::step] for name, values in self._fit.items()}
        return self.neurons.lost(some["gate"] * some["up"], self._sizes(first, some), densities)

    def better(self, density: float) -> str:
        """The factor that loses less of the output when it is thresholded at a density."""
        return min(FACTORS, key=lambda factor: self.lost(factor, [density])[0])

    def threshold(self, first: str, density: float) -> float:
        """What a part of all magnitudes lies above; 0 for all of them.

        Args:
            first: "gate", "up" or "published".
            density: the part.
        """
        return quantile(self._sizes(first, self._fit), density)

    def judge(self, first: str, threshold: float) -> LayerFit:
        """What a threshold keeps and loses of the samples that are held out."""
        factors = self._held_out
        h = factors["gate"] * factors["up"]
        kept = self._sizes(first, factors) > threshold
        sizes = np.abs(h) * self.neurons.reach
        return cut_off(self.layer, kept, sizes, h, self.neurons.down, threshold, "ffn")


def quantile(sizes: Floats, density: float) -> float:
    """The number that a part of some magnitudes lies above; 0 for all of them."""
    left = round((1 - density) * sizes.size)
    return float(np.partition(sizes, left - 1, axis=None)[left - 1]) if left else 0.0
