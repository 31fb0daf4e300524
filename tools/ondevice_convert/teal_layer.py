"""A layer's linears on samples, as TEAL looks at them: what thresholds on their inputs keep and lose."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.quantization import dequantize
from ondevice_convert.cats_layer import quantile
from ondevice_convert.fitted import LayerFit
from ondevice_convert.held_out import Floats, apart
from ondevice_convert.judged import cut_off
from ondevice_convert.neurons import Neurons
from ondevice_convert.samples import Samples

PLACES = {"q": "attention", "k": "attention", "v": "attention", "o": "o", "gate": "ffn", "up": "ffn"}
"""Where samples of a linear's input come from; that of "down" is made of the input of gate and up."""
DOWN = "down"


def fit_layer(
    base: Checkpoint, samples: Samples, layer: int, linears: Sequence[str], density: float
) -> tuple[dict[str, float], LayerFit]:
    """Thresholds that keep a part of the inputs of a layer's linears.

    Args:
        base: the dense model.
        samples: with the places of these linears.
        layer: its number.
        linears: their names.
        density: the part, of each linear.

    Returns:
        Thresholds by linear, and what they keep and lose of samples that were held out: means over the linears, each
        counting by its weights.
    """
    thresholds: dict[str, float] = {}
    fits: list[tuple[LayerFit, int]] = []

    def add(name: str, fitted_on: Floats, held_out: Floats, weight: Floats | None = None) -> None:
        thresholds[name] = quantile(np.abs(fitted_on), density)
        full = f"layers.{layer}.{name}.weight"
        if weight is None:
            weight = dequantize(base.tensor(full))
            base.release(full)
        fits.append((_judge(layer, held_out, weight, thresholds[name]), prod(weight.shape)))

    for name in linears:
        if name != DOWN:
            add(name, *apart(samples, PLACES[name], layer, base.spec.d_ff))
    if DOWN in linears:
        neurons = Neurons.of(base, layer)
        inputs = apart(samples, "ffn", layer, base.spec.d_ff)
        fitted_on, held_out = (_hidden(neurons, x, thresholds) for x in inputs)
        add(DOWN, fitted_on, held_out, neurons.down)
    return thresholds, _mean(fits)


def _hidden(neurons: Neurons, x: Floats, thresholds: dict[str, float]) -> Floats:
    """Input of down [n, D] as gate and up give it when their own inputs [n, d] are cut off already."""
    cuts = [thresholds.get(name, 0.0) for name in (("up",) if neurons.gate is None else ("gate", "up"))]
    with np.errstate(over="ignore"):  # exp(-x) of a silu that is 0
        pairs = {cut: neurons.factors(np.where(np.abs(x) > cut, x, 0)) for cut in dict.fromkeys(cuts)}
    return pairs[cuts[0]][0] * pairs[cuts[-1]][1]


def _judge(layer: int, x: Floats, weight: Floats, threshold: float) -> LayerFit:
    sizes = np.abs(x)
    contributions = sizes * np.linalg.norm(weight, axis=0)
    return cut_off(layer, sizes > threshold, contributions, x, weight, threshold, "inputs")


def _mean(fits: Sequence[tuple[LayerFit, int]]) -> LayerFit:
    total = sum(size for _, size in fits)

    def mean(name: str) -> float:
        return sum(getattr(fit, name) * size for fit, size in fits) / total

    return LayerFit(
        fits[0][0].layer,
        mean("density"),
        mean("recall"),
        mean("lost"),
        mean("oracle_lost"),
        mean("random_lost"),
        what="inputs",
    )
