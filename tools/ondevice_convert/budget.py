"""`--sparsity auto --budget`: what is fastest on this machine within a rise of perplexity.

Candidates are the exact zeros of relu, single neurons chosen by one of their factors (at a density for each layer), and
a sketch of the vocabulary head. Larger blocks are judged by what an oracle would lose with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ondevice.decoder import Decoder
from ondevice.machine import memory_bytes
from ondevice.sparsity.break_even import MARGINS
from ondevice_convert.allocation import DENSE, LayerChoices, allocate, interpolated
from ondevice_convert.fit_threshold import fit_cats_layers, fit_cats_plans, fit_exact
from ondevice_convert.fitted import Fitted
from ondevice_convert.layer_costs import layer_costs
from ondevice_convert.quality import Quality
from ondevice_convert.samples import Samples
from ondevice_convert.speed import Speed
from ondevice_convert.texts import Texts
from ondevice_convert.trial import Trial

DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
REFERENCE = 0.5
"""Density at which each layer's cost is measured; at others it follows the part of the output that is lost."""
CURVE = (0.9, 0.7, 0.5, 0.3)
COST_TOKENS = 512
TUNING_WINDOWS, CURVE_WINDOWS = 8, 4
TRIES = 3
TESTS = 3 * (TRIES + 2)
"""Candidates that may be measured on the unseen text, at most: the method, a sketched head and both, in each round."""
CONFIDENCE = 1 - 0.05 / TESTS
"""Of each bound, such that all of them hold together with 95 % (Bonferroni): what passes was picked by them."""
FIRST_SHARE, BACK_OFF = 0.8, 0.6
"""Part of the budget that layers get at first, since their costs only roughly add up, and of that at each new try."""
WORTH = 1.02
"""Speed-up, by the lower end of its interval, from which on a candidate is worth having."""


@dataclass(frozen=True, slots=True)
class Point:
    """All layers at one density.

    Args:
        density: of their neurons.
        quality: on text that was fitted on.
        speed: with all layers skipping, whatever the plan would say.
    """

    density: float
    quality: Quality
    speed: Speed


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Args:
        name: in words.
        fitted: the method; None leaves the layers dense.
        sketch_head: whether the head is sketched.
        quality: on unseen text; None for the dense model itself.
        speeds: of the dense model and of this one, with the plan of this machine; None for the dense model itself.
        curve: what other densities give.
        notes: sentences on what was refused, and why.
    """

    name: str
    fitted: Fitted | None = None
    sketch_head: bool = False
    quality: Quality | None = None
    speeds: tuple[Speed, Speed] | None = None
    curve: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def speedup(self) -> float:
        """Over the dense model."""
        return self.speeds[1].speedup if self.speeds else 1.0


class Budget:
    """Chooses within a budget.

    Args:
        trial: makes and runs candidates.
        samples: of the place "ffn".
        texts: to tune and to verify on.
        rise: of perplexity that is allowed, as a part of it; the upper 95 % bound must hold.
    """

    def __init__(self, trial: Trial, samples: Samples, texts: Texts, rise: float) -> None:
        self.trial, self.samples, self.texts, self.rise = trial, samples, texts, rise
        self.notes: list[str] = []
        self.curve: tuple[Point, ...] = ()
        size = texts.window * TUNING_WINDOWS
        start = max(0, (len(texts.fit) - size) // 2)
        self._tuning = texts.fit[start : start + size]

    def choose(self) -> Choice:
        """The fastest candidate that holds the budget on unseen text."""
        tried: set[str] = set()
        found: list[Choice] = []
        for fitted in self._methods():
            best = self._best_of(fitted, tried)
            if best is not None:
                found.append(best)
                if best.fitted is fitted:
                    break
        if not found:
            self.notes.append("nothing that was tried is faster and within the budget: the model stays dense")
            return Choice("the dense model", curve=self.curve, notes=tuple(self.notes))
        return replace(max(found, key=lambda choice: choice.speedup), curve=self.curve, notes=tuple(self.notes))

    def _methods(self) -> Iterator[Fitted | None]:
        """What to try, the most promising first: zeros, which cost nothing, then densities, each time higher ones."""
        exact = fit_exact(self.trial.base, self.samples, self.trial.progress)
        if exact is not None:
            yield exact
        layers, share = self._choices(), FIRST_SHARE
        seen: list[float] = []
        for _ in range(TRIES):
            fitted, share = self._tuned(layers, share)
            densities = list(fitted.method.densities or ()) if fitted else []
            if fitted is None or densities == seen:
                break
            yield fitted
            seen, share = densities, share * BACK_OFF
        yield None

    def _best_of(self, fitted: Fitted | None, tried: set[str]) -> Choice | None:
        """The fastest of a method, a sketched head, and both, that holds; None where none does.

        Quality is measured with all layers skipping that may, as another machine's plan could have it; speed with this
        machine's plan.
        """
        trial, texts = self.trial, self.texts
        whole = [(trial.dense, trial.dense)]
        candidates: list[tuple[Fitted | None, bool, Decoder, Decoder]] = []
        if fitted is not None:
            candidates.append((fitted, False, trial.decoder(fitted), trial.decoder(fitted, "auto")))
            whole.append(candidates[0][2:])
        for method, (skipping, planned) in zip((None, fitted), whole):
            sketched = trial.sketched(skipping)
            if sketched is not None:
                quick = sketched if planned is skipping else trial.sketched(planned)
                assert quick is not None
                candidates.append((method, True, sketched, quick))
        judged = [c[2] for c in candidates]
        qualities = trial.quality(judged, texts.unseen, texts.window, "on unseen text", CONFIDENCE)
        dense, *speeds = trial.speeds([c[3] for c in candidates])
        best, highest = None, 0.0
        for (method, sketch, _, _), quality, speed in zip(candidates, qualities, speeds):
            name, problem = _name(method, sketch), self._problem(quality, speed)
            if problem:
                self._note(f"{name}: refused, {problem}", tried)
            elif speed.speedup > highest:
                highest = speed.speedup
                best = Choice(name, method, sketch, quality, (dense, speed))
        return best

    def _problem(self, quality: Quality, speed: Speed) -> str:
        """Why a candidate is refused; empty if it is not."""
        bound = quality.rise_upper
        if bound is None or bound > self.rise:
            said = "unknown, from a single window" if bound is None else f"{100 * bound:.2f} %"
            return (
                f"perplexity on unseen text rises by {100 * quality.rise:.2f} %, its upper bound is {said}, and the "
                f"budget {100 * self.rise:g} %"
            )
        if speed.low < WORTH:
            return f"it decodes {speed.speedup:.3f} times as fast as dense ({speed.low:.3f} to {speed.high:.3f})"
        return ""

    def _note(self, text: str, tried: set[str]) -> None:
        if text not in tried:
            tried.add(text)
            self.notes.append(text)

    def _choices(self) -> list[LayerChoices]:
        """What each layer may keep, measured: costs on text, gains on this machine."""
        trial, n_layers = self.trial, self.trial.base.spec.n_layers
        if not trial.base.spec.gated:
            self.notes.append("single neurons chosen by one of their factors: refused, the FFN has no gate")
            return []
        losses: dict[float, list[float]] = {density: [] for density in (REFERENCE, *DENSITIES)}
        plans = [[density] * n_layers for density in (REFERENCE, *CURVE)]
        middle, *fits = fit_cats_plans(trial.base, self.samples, plans, progress=trial.progress, losses=losses)
        ratios = trial.ratios(middle)
        skipping = trial.decoder(middle)
        some = self._tuning[: min(COST_TOKENS, trial.base.spec.context_length)]
        costs = layer_costs(trial.dense, skipping, some, trial.progress)
        del skipping
        self._draw(fits)
        layers = []
        for i, (cost, times) in enumerate(zip(costs, ratios)):
            part = cost / max(losses[REFERENCE][i], 1e-12)
            kinds = [part * losses[density][i] for density in DENSITIES]
            layers.append(LayerChoices(DENSITIES, kinds, [_gain(times, density) for density in DENSITIES]))
        paying = sum(max(layer.gains) > 0 for layer in layers)
        if not paying:
            self.notes.append(
                "single neurons: refused, no layer is faster with them on this machine at densities from "
                f"{DENSITIES[-1]:g} on, by the plan's measurement"
            )
        return layers if paying else []

    def _tuned(self, layers: list[LayerChoices], share: float) -> tuple[Fitted | None, float]:
        """Densities for which the rise on the tuning text is within the budget; None where all layers end dense.

        Args:
            share: part of the budget that costs, which only roughly add up, may take at first.

        Returns:
            The method, and the share that led to it.
        """
        for _ in range(TRIES):
            densities = allocate(layers, share * math.log1p(self.rise))
            if not layers or min(densities) >= DENSE:
                break
            fitted = fit_cats_layers(self.trial.base, self.samples, densities, progress=self.trial.progress)
            decoder = self.trial.decoder(fitted)
            quality = self.trial.quality([decoder], self._tuning, self.texts.window, "while tuning")[0]
            if quality.rise_upper is not None and quality.rise_upper <= self.rise:
                return fitted, share
            share *= BACK_OFF
        return None, share

    def _draw(self, fits: Sequence[Fitted]) -> None:
        """The curve of quality and speed over density, of models with all layers at the densities of `CURVE`."""
        some = self._tuning[: CURVE_WINDOWS * self.texts.window]
        available, points = memory_bytes()[1], []
        scarce = available is not None and 2 * len(fits) * self.trial.base.nbytes > available
        together = 1 if scarce else len(fits)
        for start in range(0, len(fits), together):
            decoders = [self.trial.decoder(fitted) for fitted in fits[start : start + together]]
            qualities = self.trial.quality(decoders, some, self.texts.window, "over density")
            points += list(zip(qualities, self.trial.speeds(decoders)[1:]))
        self.curve = tuple(Point(density, *point) for density, point in zip(CURVE, points))


def _gain(ratios: dict[float, float] | None, density: float) -> float:
    """Part of a layer's time that skipping saves; 0 where the plan would run the layer dense."""
    if ratios is None:
        return 1 - density
    ratio = interpolated(ratios, density)
    return 1 - ratio if ratio <= MARGINS["approximate"] else 0.0


def _name(fitted: Fitted | None, sketch: bool) -> str:
    parts = [fitted.method.name] if fitted else []
    return " with ".join([*parts, *(["a sketched head"] if sketch else [])])
