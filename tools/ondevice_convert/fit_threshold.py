"""Thresholds of CATS and TEAL, from the magnitudes on samples; and the zeros of relu, which need none.

Source: CATS (Lee et al. 2024), section 3; TEAL (Liu et al. 2024), section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.quantization import Tensor
from ondevice.commands.method_option import MethodOption
from ondevice.errors import OptionError
from ondevice.sparsity.threshold import LINEARS, Cats, Teal
from ondevice.spec import ModelSpec
from ondevice_convert import teal_layer
from ondevice_convert.cats_layer import BEST, FIRSTS, PUBLISHED, CatsLayer
from ondevice_convert.fitted import Fitted, LayerFit
from ondevice_convert.held_out import apart
from ondevice_convert.judged import judge, part_lost
from ondevice_convert.neurons import Neurons
from ondevice_convert.samples import Samples

Progress = Callable[[int, int, str], None] | None

CATS_KEYS = {"density": "0.5", "first": BEST}
TEAL_KEYS = {"density": "0.5", "linears": "all"}
CATS_PLACES = ("ffn",)
TEAL_PLACES = ("attention", "o", "ffn")
EXACT_PLACES = ("ffn",)
"""What `gather` must have kept."""


def check_cats(option: MethodOption, spec: ModelSpec) -> None:
    """Refuses bad options, and models without a gate, by OptionError."""
    _check_gate(spec)
    option.number("density")
    option.word("first", *FIRSTS)


def check_teal(option: MethodOption, spec: ModelSpec) -> None:
    """Refuses bad options by OptionError."""
    option.number("density")
    _linears(option, spec)


def fit_cats(base: Checkpoint, samples: Samples, option: MethodOption, progress: Progress = None) -> Fitted:
    """CATS with one density for all layers.

    Args:
        base: the dense model.
        samples: with CATS_PLACES.
        option: with CATS_KEYS. density: mean part of the neurons kept; first: factor that is thresholded, "best" takes
            in each layer the one that loses less, "published" is the activated gate without weighing.
        progress: called with (layers done, layers in all, what is done).

    Raises:
        OptionError: no gate, a bad option, or too few samples.
    """
    density, first = option.number("density"), option.word("first", *FIRSTS)
    return fit_cats_layers(base, samples, [density] * base.spec.n_layers, first, progress)


def fit_cats_layers(
    base: Checkpoint, samples: Samples, densities: Sequence[float], first: str = BEST, progress: Progress = None
) -> Fitted:
    """CATS with a density for each layer.

    Args:
        base, samples, progress: as of `fit_cats`.
        densities: above 0; 1 runs all neurons, which is threshold 0.
        first: as of `fit_cats`.

    Raises:
        OptionError: no gate, bad densities, or too few samples.
    """
    return fit_cats_plans(base, samples, [densities], first, progress)[0]


def fit_cats_plans(
    base: Checkpoint,
    samples: Samples,
    plans: Sequence[Sequence[float]],
    first: str = BEST,
    progress: Progress = None,
    losses: dict[float, list[float]] | None = None,
) -> list[Fitted]:
    """CATS for several choices of densities, with one look at each layer.

    Args:
        base, samples, first, progress: as of `fit_cats`.
        plans: each with a density for each layer, as of `fit_cats_layers`.
        losses: for each density that it has as a key, gets the part of each layer's output (its square) that is lost
            there.

    Raises:
        OptionError: no gate, bad densities, or too few samples.
    """
    spec = base.spec
    _check_gate(spec)
    for plan in plans:
        if len(plan) != spec.n_layers or not all(0 < density <= 1 for density in plan):
            raise OptionError(f"cats: densities {list(plan)}; give {spec.n_layers} numbers above 0, up to 1")
    made = [_Cats() for _ in plans]
    for i in range(spec.n_layers):
        _say(progress, i, spec, "thresholds of cats")
        layer = CatsLayer(base, samples, i)
        for plan, own in zip(plans, made):
            own.add(layer, first, plan[i])
        if losses is not None:
            for density, lost in zip(losses, layer.lost(first, list(losses))):
                losses[density].append(lost)
    _say(progress, spec.n_layers, spec, "thresholds of cats")
    return [own.fitted(spec) for own in made]


@dataclass(slots=True)
class _Cats:
    """Layers of one model, as they are fitted."""

    thresholds: list[float] = field(default_factory=list)
    firsts: list[str] = field(default_factory=list)
    added: dict[str, Tensor] = field(default_factory=dict)
    fits: list[LayerFit] = field(default_factory=list)

    def add(self, layer: CatsLayer, first: str, density: float) -> None:
        chosen = layer.better(density) if first == BEST else first
        self.thresholds.append(layer.threshold(chosen, density))
        self.fits.append(layer.judge(chosen, self.thresholds[-1]))
        if first != PUBLISHED:
            self.firsts.append(chosen)
            self.added[f"layers.{layer.layer}.ffn_router.weight"] = layer.weights[chosen]

    def fitted(self, spec: ModelSpec) -> Fitted:
        densities = _densities(self.fits, spec.d_ff)
        method = Cats(tuple(self.thresholds), tuple(self.firsts) or None, densities=densities)
        return Fitted(method, self.added, layers=tuple(self.fits))


def fit_teal(base: Checkpoint, samples: Samples, option: MethodOption, progress: Progress = None) -> Fitted:
    """TEAL with one density for all linears of all layers.

    Args:
        base: the dense model.
        samples: with TEAL_PLACES.
        option: with TEAL_KEYS. density: part of the inputs kept; linears: names with + between, or "all".
        progress: called with (layers done, layers in all, what is done).

    Raises:
        OptionError: a bad option, or too few samples.
    """
    density, spec = option.number("density"), base.spec
    linears = _linears(option, spec)
    thresholds: dict[str, list[float]] = {name: [] for name in linears}
    fits = []
    for i in range(spec.n_layers):
        _say(progress, i, spec, "thresholds of teal")
        found, fit = teal_layer.fit_layer(base, samples, i, linears, density)
        fits.append(fit)
        for name, threshold in found.items():
            thresholds[name].append(threshold)
    _say(progress, spec.n_layers, spec, "thresholds of teal")
    stated = tuple((name, tuple(values)) for name, values in thresholds.items())
    return Fitted(Teal(stated, densities=_densities(fits, spec.d_ff)), layers=tuple(fits))


def fit_exact(base: Checkpoint, samples: Samples, progress: Progress = None) -> Fitted | None:
    """What skips the zeros of relu and nothing else: cats where there is a gate, teal of down where there is none.

    Args:
        base: the dense model.
        samples: with EXACT_PLACES, to see how many zeros there are.
        progress: called with (layers done, layers in all, what is done).

    Returns:
        None for a model whose activations are no zeros.
    """
    spec = base.spec
    if spec.activation != "relu":
        return None
    fits = []
    for i in range(spec.n_layers):
        _say(progress, i, spec, "zeros of relu")
        neurons = Neurons.of(base, i)
        gate, up = neurons.factors(apart(samples, "ffn", i, spec.d_ff)[1])
        h, what = gate * up, "ffn" if spec.gated else "inputs"
        kept = (gate if spec.gated else up) > 0
        sizes = np.abs(h) * neurons.reach
        fits.append(judge(i, kept, sizes, lambda mask, h=h, down=neurons.down: part_lost(h, down, mask), what=what))  # type: ignore[misc]
    _say(progress, spec.n_layers, spec, "zeros of relu")
    zeros, densities = (0.0,) * spec.n_layers, _densities(fits, spec.d_ff)
    method = Cats(zeros, densities=densities) if spec.gated else Teal((("down", zeros),), densities=densities)
    return Fitted(method, layers=tuple(fits))


def _linears(option: MethodOption, spec: ModelSpec) -> list[str]:
    """Names in the model's order."""
    known = [name for name in LINEARS if spec.gated or name != "gate"]
    stated = option.values["linears"]
    if stated == "all":
        return known
    names = stated.split("+")
    for name in names:
        if name not in known:
            raise OptionError(
                f"--sparsity {option.text}: linears has {name!r}; this model has {'+'.join(known)} (or take all)"
            )
    return [name for name in known if name in names]


def _check_gate(spec: ModelSpec) -> None:
    if not spec.gated:
        raise OptionError("cats needs an FFN with a gate, which this model lacks; take teal or lte")


def _densities(fits: Sequence[LayerFit], units: int) -> tuple[float, ...]:
    """As measured; a config.json takes none of 0."""
    return tuple(max(fit.density, 1 / units) for fit in fits)


def _say(progress: Progress, done: int, spec: ModelSpec, what: str) -> None:
    if progress:
        progress(done, spec.n_layers, what)
