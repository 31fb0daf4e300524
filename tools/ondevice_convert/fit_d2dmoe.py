"""D2DMoE for a finished model: routers that predict how long the output of each expert will be.

Source: D2DMoE (Szatkowski et al. 2024), section 3; the network is not made sparser first, which there comes before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.quantization import Tensor
from ondevice.commands.method_option import MethodOption
from ondevice.errors import OptionError
from ondevice.sparsity.d2dmoe import TAU, WIDTH, D2dmoe
from ondevice.spec import ModelSpec
from ondevice_convert.block_data import BlockData, Progress, missed, part_of
from ondevice_convert.blocks import Mask, border_at, judge
from ondevice_convert.fitted import Fitted, LayerFit
from ondevice_convert.gradient import NormLoss, descend, predicted_norms
from ondevice_convert.neurons import Floats
from ondevice_convert.orders import ORDERS
from ondevice_convert.ridge import Spectrum, linear, of_rank
from ondevice_convert.samples import Samples

UNSTATED = "unstated"
KEYS = {
    "tau": UNSTATED,
    "density": UNSTATED,
    "block": "32",
    "width": "128",
    "order": "cofiring",
    "steps": "0",
}
"""Of `--sparsity d2dmoe:...`, and what they are if not given; tau is then the paper's."""
BLOCKS = (16, 128)
"""Neurons of the smallest and the largest expert."""
RIDGES = (0.01, 0.1, 1.0, 10.0)
SECOND_RIDGE = 1e-2
JUDGED_AT = (0.3, 0.5, 0.7)
"""Densities at which routers are compared, since tau may be set later."""
CLIP = 1.25
"""Typical lengths beyond which lengths count as no longer. A few positions have huge outputs, and how far above the
others an expert lies matters less than that it does."""
RATE = 3e-4

Router = tuple[NDArray[np.float16], NDArray[np.float16]]


@dataclass(slots=True)
class _Found:
    """What was fitted, by layer: routers, groups, and predictions on samples as parts of each one's largest."""

    routers: list[Router] = field(default_factory=list)
    groups: list[NDArray[np.int64]] = field(default_factory=list)
    shares: list[NDArray[np.float16]] = field(default_factory=list)


def check_d2dmoe(option: MethodOption, spec: ModelSpec) -> None:
    """Refuses bad options by OptionError."""
    block = option.divisor("block", spec.d_ff, "a layer's neurons")
    if not BLOCKS[0] <= block <= BLOCKS[1]:
        raise OptionError(
            f"--sparsity {option.text}: block is {block}; experts have {BLOCKS[0]} to {BLOCKS[1]} neurons, so take a "
            f"divisor of {spec.d_ff} between these"
        )
    _aim(option)
    option.whole("width", high=max(WIDTH, spec.d_ff))
    option.word("order", *ORDERS)
    option.whole("steps", zero=True)


def fit_d2dmoe(base: Checkpoint, samples: Samples, option: MethodOption, progress: Progress | None = None) -> Fitted:
    """Routers of all layers, and one tau for them.

    Args:
        base: the dense model.
        samples: with the place "ffn".
        option: with `KEYS`: tau, or instead of it density, the mean part of the experts that run; block, their neurons;
            width of the routers; order, of `ORDERS`; steps of gradient after the closed form, from 0 on.
        progress: called with (layers done, layers in all, label).

    Raises:
        OptionError: values out of range, both tau and density, or too few samples.
    """
    spec = base.spec
    check_d2dmoe(option, spec)
    block = option.whole("block")
    tau, density = _aim(option)
    width, order = option.whole("width", high=max(WIDTH, spec.d_ff)), option.word("order", *ORDERS)
    steps = option.whole("steps", zero=True)
    found = _Found()
    for i in range(spec.n_layers):
        part_of(progress, i, spec.n_layers, "fitting d2dmoe")
        data = BlockData.of(base, samples, i, block, order)
        found.groups.append(data.groups)
        found.routers.append(_router(data, width, steps))
        if density is not None:
            norms = _predicted(np.concatenate([data.fit.x, data.choose.x]), found.routers[i])
            found.shares.append(_shares(norms).astype(np.float16))
    notes: list[str] = []
    if density is not None:
        tau = _tau_at(np.concatenate([shares.ravel() for shares in found.shares]).astype(np.float32), density)
        notes.append(f"tau {tau:.4g} runs {density:.0%} of the experts on the positions that routers were fitted on")
    return _judged(base, samples, D2dmoe(block, width, tau), found, order, notes, progress)


def _aim(option: MethodOption) -> tuple[float, float | None]:
    """Tau, and the density that decides it where one is stated."""
    tau, density = (option.values[key] != UNSTATED for key in ("tau", "density"))
    if tau and density:
        raise OptionError(f"--sparsity {option.text}: tau and density are both given; leave one out")
    return (option.number("tau", zero=True) if tau else TAU), (option.number("density") if density else None)


def _tau_at(shares: Floats, density: float) -> float:
    """The tau whose experts are a part of all, with predictions as parts of each sample's largest."""
    if density >= 1:
        return 0.0
    return float(np.clip(border_at(shares, density), 0, 1))


def _judged(
    base: Checkpoint,
    samples: Samples,
    method: D2dmoe,
    found: _Found,
    order: str,
    notes: list[str],
    progress: Progress | None,
) -> Fitted:
    """The method with what its choices come to on samples that nothing was fitted on."""
    added: dict[str, Tensor] = {}
    layers: list[LayerFit] = []
    for i, (router, groups) in enumerate(zip(found.routers, found.groups)):
        part_of(progress, i, len(found.groups), "measuring d2dmoe")
        data = BlockData.of(base, samples, i, method.block, order, groups)
        held_out = data.held_out
        kept = chosen(_predicted(held_out.x, router), method.tau)
        layers.append(judge(i, data.neurons, held_out.x, groups, held_out.norms, kept))
        added |= {f"layers.{i}.ffn_router.{part}.weight": weight for part, weight in enumerate(router)}
    part_of(progress, len(layers), len(layers), "measuring d2dmoe")
    fitted = D2dmoe(method.block, method.width, method.tau, densities=tuple(layer.density for layer in layers))
    orders = {} if order == "model" else {i: groups.ravel() for i, groups in enumerate(found.groups)}
    return Fitted(fitted, added, orders, tuple(layers), tuple(notes))


def chosen(norms: Floats, tau: float) -> Mask:
    """Experts [n, experts] that run: those whose predicted length is at least tau times the longest of a sample."""
    most = norms.max(axis=1, keepdims=True)
    mask: Mask = norms >= np.float32(tau) * most
    return mask


def _shares(norms: Floats) -> Floats:
    """Predictions as parts of each sample's largest."""
    shares: Floats = norms / np.maximum(norms.max(axis=1, keepdims=True), np.float32(1e-30))
    return shares


def _predicted(x: Floats, router: Router) -> Floats:
    first, second = router
    return predicted_norms(x, first.astype(np.float32), second.astype(np.float32))


def _router(data: BlockData, width: int, steps: int) -> Router:
    """First [width, d] and second [experts, width], of values that float16 holds well."""
    first, second = _closed_form(data, width)
    if steps:
        first, second = _descended(data, first, second, steps)
    hidden = np.maximum(data.fit.x @ first.T, 0)
    sizes = np.sqrt((hidden**2).mean(axis=0))
    # Parts that hardly ever give anything stay small.
    sizes = np.maximum(sizes, np.float32(1e-3) * sizes.max() + np.float32(1e-20))
    first, second = first / sizes[:, None], second * sizes
    # A token's predictions count as parts of each other only, so their size is free.
    return first.astype(np.float16), (second / max(float(np.abs(second).max()), 1e-20)).astype(np.float16)


def _targets(norms: Floats) -> Floats:
    """Lengths, the largest of them clipped."""
    # Weighed by themselves: zeros, of which some models have many, have no say in what is typical.
    typical = float((norms**2).sum(dtype=np.float64)) / max(float(norms.sum(dtype=np.float64)), 1e-20)
    targets: Floats = np.minimum(norms, np.float32(CLIP * typical))
    return targets


def _missed(x: Floats, norms: Floats, first: Floats, second: Floats) -> float:
    """What is left out with a router, at some densities, in parts of the squares of the outputs."""
    shares = _shares(predicted_norms(x, first, second))
    return sum(missed(shares, norms, density) for density in JUDGED_AT)


def _closed_form(data: BlockData, width: int) -> tuple[Floats, Floats]:
    """Both signs of the directions that predict lengths best, and ridge regression on what relu makes of them.

    The two parts of a direction give its value as their difference, and as their sum its size, which the constant part
    of the lengths needs: the router has no bias.
    """
    fit, choose, targets = data.fit, data.choose, _targets(data.fit.norms)
    spectrum = Spectrum.of(fit.x)
    best, least = None, np.inf
    for ridge in RIDGES:
        half = _directions(spectrum, targets, (width + 1) // 2, ridge)
        first = np.concatenate([half, -half])[:width]
        hidden = Spectrum.of(np.maximum(fit.x @ first.T, 0), intercept=False)
        second, _ = linear(hidden, targets, SECOND_RIDGE)
        found = _missed(choose.x, choose.norms, first, second)
        if best is None or found < least:
            best, least = (first, second), found
    assert best is not None
    return best


def _directions(spectrum: Spectrum, targets: Floats, count: int, ridge: float) -> Floats:
    """Rows [count, d] that predict targets best; where there are fewer targets, then the main ones of the inputs."""
    best, _ = of_rank(spectrum, targets, min(count, targets.shape[1]), ridge)
    others = count - len(best)
    main = (spectrum.directions / np.sqrt(spectrum.penalized(ridge))).T[::-1][:others]
    return np.concatenate([best, main, np.zeros((others - len(main), best.shape[1]), np.float32)])


def _descended(data: BlockData, first: Floats, second: Floats, steps: int) -> tuple[Floats, Floats]:
    """The router after gradient steps on the squared error of lengths."""
    fit, choose = data.fit, data.choose
    # Steps are of one size for all inputs, so these are made so too, but for those that hardly vary.
    scale = np.sqrt((fit.x**2).mean(axis=0))
    scale += np.float32(0.1) * scale.mean() + np.float32(1e-6)
    targets = _targets(fit.norms)
    size = np.float32(np.sqrt((targets**2).mean()) + 1e-20)
    loss, unseen = NormLoss(fit.x / scale, targets / size), choose.x / scale
    first, second = descend(
        (first * scale, second / size),
        loss.gradient,
        lambda router: _missed(unseen, choose.norms, *router),
        len(fit.x),
        steps,
        RATE,
    )
    return first / scale, second
