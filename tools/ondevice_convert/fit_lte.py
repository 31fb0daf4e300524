"""LTE for a finished model: routers of groups of neurons, layer by layer, with the network as it is.

Source: Learn To be Efficient (Zheng et al. 2024), section 3, of which this is the router alone. There router and
network are trained together; here the network stays, and a group is wanted where its output is long.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.quantization import Tensor
from ondevice.commands.method_option import MethodOption
from ondevice.sparsity.lte import Lte
from ondevice.spec import ModelSpec
from ondevice_convert.block_data import BlockData, Progress, missed, part_of
from ondevice_convert.blocks import border_at, judge
from ondevice_convert.fitted import Fitted, LayerFit
from ondevice_convert.gradient import LabelLoss, Parameters, descend
from ondevice_convert.neurons import Floats
from ondevice_convert.orders import ORDERS
from ondevice_convert.ridge import Spectrum, linear
from ondevice_convert.samples import Samples

KEYS = {"density": "0.5", "block": "32", "order": "cofiring", "steps": "0"}
"""Of `--sparsity lte:...`, and what they are if not given."""
RIDGES = (0.01, 0.1, 1.0, 10.0)
CLIP = 2.0
"""Lengths that count as no longer, in thresholds: how far above it a wanted group lies must not matter much."""
RATE = 1e-3


def check_lte(option: MethodOption, spec: ModelSpec) -> None:
    """Refuses bad options by OptionError."""
    option.divisor("block", spec.d_ff, "a layer's neurons")
    option.number("density")
    option.word("order", *ORDERS)
    option.whole("steps", zero=True)


def fit_lte(base: Checkpoint, samples: Samples, option: MethodOption, progress: Progress | None = None) -> Fitted:
    """Routers that keep one part of all layers' groups.

    Args:
        base: the dense model.
        samples: with the place "ffn".
        option: with `KEYS`: density, the mean part of the groups that run; block, their neurons; order, of
            `ORDERS`; steps of gradient after the closed form, from 0 on.
        progress: called with (layers done, layers in all, label).

    Raises:
        OptionError: values out of range, or too few samples.
    """
    block = option.divisor("block", base.spec.d_ff, "a layer's neurons")
    densities = [option.number("density")] * base.spec.n_layers
    steps = option.whole("steps", zero=True)
    return fit_lte_layers(base, samples, densities, block, option.word("order", *ORDERS), steps, progress)


def fit_lte_layers(
    base: Checkpoint,
    samples: Samples,
    densities: Sequence[float],
    block: int,
    order: str,
    steps: int,
    progress: Progress | None = None,
) -> Fitted:
    """As `fit_lte`, with a density for each layer; 1 runs all of its groups."""
    added: dict[str, Tensor] = {}
    orders: dict[int, NDArray[np.int64]] = {}
    layers: list[LayerFit] = []
    for i, density in enumerate(densities):
        part_of(progress, i, len(densities), "fitting lte")
        data = BlockData.of(base, samples, i, block, order)
        weight, bias = _router(data, density, steps)
        added[f"layers.{i}.ffn_router.weight"], added[f"layers.{i}.ffn_router.bias"] = weight, bias
        if order != "model":
            orders[i] = data.groups.ravel()
        held_out = data.held_out
        kept = held_out.x @ weight.astype(np.float32).T + bias > 0
        layers.append(judge(i, data.neurons, held_out.x, data.groups, held_out.norms, kept))
    part_of(progress, len(densities), len(densities), "fitting lte")
    # A layer that keeps nothing of these few samples will keep something of others.
    kept_parts = tuple(max(layer.density, 1e-3) for layer in layers)
    return Fitted(Lte(block, 0.5, True, densities=kept_parts), added, orders, tuple(layers))


def _router(data: BlockData, density: float, steps: int) -> tuple[NDArray[np.float16], Floats]:
    """Weight [groups, d] and bias [groups] whose scores are above 0 for a part of the samples' groups."""
    fit, choose = data.fit, data.choose
    if density >= 1:
        return np.zeros((len(data.groups), fit.x.shape[1]), np.float16), np.ones(len(data.groups), np.float32)
    border = border_at(fit.norms, density)
    spectrum = Spectrum.of(fit.x)
    # Where zeros alone are left out, everything above counts the same.
    targets = np.minimum(fit.norms, CLIP * border if border > 0 else fit.norms.mean())
    routers = [linear(spectrum, targets, ridge) for ridge in RIDGES]
    weight, bias = min(routers, key=lambda router: missed(choose.x @ router[0].T + router[1], choose.norms, density))
    if steps:
        weight, bias = _descended(data, weight, bias - border, border, density, steps)
    spread = float((fit.x @ weight.T + bias).std()) or 1.0
    rounded = (weight / spread).astype(np.float16)
    shift = bias / np.float32(spread)
    seen = np.concatenate([fit.x, choose.x]) @ rounded.astype(np.float32).T + shift
    return rounded, shift - np.float32(border_at(seen, density))


def _descended(
    data: BlockData, weight: Floats, bias: Floats, border: float, density: float, steps: int
) -> tuple[Floats, Floats]:
    """The router after gradient steps on cross-entropy, in which a mistake counts as much as it would lose or save."""
    fit, choose = data.fit, data.choose
    # Steps are of one size for all inputs, so these are made so too, but for those that hardly vary.
    mean, scale = fit.x.mean(axis=0), fit.x.std(axis=0)
    scale += np.float32(0.1) * scale.mean() + np.float32(1e-6)
    x, unseen = (fit.x - mean) / scale, (choose.x - mean) / scale
    stakes: Floats = np.abs(np.minimum(fit.norms, CLIP * border) - np.float32(border))
    stakes /= np.float32(max(float(stakes.mean()), 1e-20))
    loss = LabelLoss(x, fit.norms > border, stakes)
    scores = fit.x @ weight.T + bias
    sharpness = 2 / max(float(scores.std()), 1e-20)
    start: Parameters = (weight * scale * np.float32(sharpness), (weight @ mean + bias) * np.float32(sharpness))

    def lost(parameters: Parameters) -> float:
        return missed(unseen @ parameters[0].T + parameters[1], choose.norms, density)

    weight, bias = descend(start, loss.gradient, lost, len(x), steps, RATE)
    return weight / scale, bias - (weight / scale) @ mean
