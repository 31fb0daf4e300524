"""Below which density a layer is faster sparse: measured with the model's own weights, on this machine.

Layers without their attention run one after the other, as many as caches do not hold, once dense and once at each of
some densities with random selections, in turn. What selecting takes is part of it.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ondevice.machine import memory_bytes
from ondevice.ops.base import Array, Ops, Step
from ondevice.packing import Packer
from ondevice.sparsity import measurements
from ondevice.sparsity.plan import Plan

if TYPE_CHECKING:
    from ondevice.checkpoint.base import Checkpoint
    from ondevice.layer import Layer
    from ondevice.sparsity.settings import SparsitySettings
    from ondevice.spec import ModelSpec

DENSITIES = (0.1, 0.25, 0.5, 0.75, 1.0)
MARGINS = {"exact": 0.97, "trained": 0.97, "approximate": 0.95}
"""Time of a sparse layer, as a part of a dense one's, up to which it counts as faster: a trial is short, and where
dense is also more exact, sparse must be worth it."""
TRIAL_BYTES = 1 << 27
"""Weights of a trial in each form: more than most caches hold."""
SECONDS = 1.2
"""That a trial's timed runs may take."""
ROUNDS = (5, 40)
"""Fewest and most of them."""
Progress = Callable[[int, int, str], None]


class BreakEvens:
    """Answers for the layers of a model. Layers of equal shapes and formats share a measurement.

    Args:
        checkpoint, settings: of the model.
        ops: that will run it.
        spec: of the model as it will run.
        progress: hears of measurements.
    """

    def __init__(
        self, checkpoint: Checkpoint, ops: Ops, spec: ModelSpec, settings: SparsitySettings, progress: Progress | None
    ) -> None:
        self.checkpoint, self.ops, self.spec, self.settings, self.progress = checkpoint, ops, spec, settings, progress
        self._found: dict[str, dict[float, float]] = {}

    def of_layer(self, i: int) -> float:
        """The break-even of layer `i`; 1 where time is not what decides."""
        ratios, method = self.ratios(i), self.spec.sparsity
        return 1.0 if ratios is None else crossing(ratios, MARGINS[method.kind(self.spec) if method else "exact"])

    def ratios(self, i: int) -> dict[float, float] | None:
        """Time of layer `i` sparse, as a part of its time dense, by ascending density; None if time does not decide."""
        table = self.ops.trial()
        if table is None:
            return None
        form = self._form(i)
        if form not in self._found:
            key = {"form": form, "layers": self.spec.n_layers, "method": self._method()}
            ratios = measurements.recall(key, table)
            if ratios is None:
                ratios = self._measure(table, [j for j in range(self.spec.n_layers) if self._alike(j, form)])
                measurements.keep(key, table, ratios)
            self._found[form] = unbiased(ratios)
        return self._found[form]

    def _form(self, i: int) -> str:
        """Shapes and formats of a layer's tensors, as text."""
        prefix = f"layers.{i}."
        names = [name for name in self.spec.tensors() if name.startswith(prefix)]
        told = [(name.removeprefix(prefix), self.spec.tensors()[name], self.checkpoint.stored(name)) for name in names]
        return hashlib.sha256(json.dumps(sorted(told)).encode()).hexdigest()

    def _alike(self, i: int, form: str) -> bool:
        method = self.spec.sparsity
        density = None if method is None else method.density(self.spec, i)
        return density is not None and density < 1 and self._form(i) == form

    def _method(self) -> Any:
        return self.spec.sparsity and self.spec.sparsity.section()

    def _measure(self, table: Ops, layers: list[int]) -> dict[float, float]:
        """Seconds sparse / seconds dense, by density."""
        each = sum(
            self.checkpoint.stored(name)[1] for name in self.spec.tensors() if name.startswith(f"layers.{layers[0]}.")
        )
        available = memory_bytes()[1]
        room = TRIAL_BYTES if available is None else min(TRIAL_BYTES, available // 8)
        count = max(1, min(self.spec.n_layers, -(-room // each)))
        chosen = [layers[n % len(layers)] for n in range(count)]
        forms: list[list[Layer]] = []
        for limit in (0.0, 1.0):
            plan = Plan((limit,) * self.spec.n_layers)
            packer = Packer(self.checkpoint, table, self.spec, self.settings, plan, None)
            forms.append([])
            for i in chosen:
                self._say()
                forms[-1].append(packer.layer(i))
        start = table.pack_embedding(np.ones((1, self.spec.d_model), np.float32))
        table.prepare(self.spec, self.progress)
        return _ratios(table, start, forms[0], forms[1], self._say)

    def _say(self) -> None:
        if self.progress:
            self.progress(0, 0, "measuring where skipping is faster, once for this machine")


def unbiased(ratios: dict[float, float]) -> dict[float, float]:
    """Time ratios without what flatters sparse layers in a trial.

    A sparse layer that keeps everything does all that the dense one does. Where it still was faster, all ratios are too
    low by as much. (Layers as small as SmolLM2's, in a trial without head and attention, by up to 10 %.)
    """
    factor = max(1.0, 1.0 / ratios[max(ratios)])
    return {density: ratio * factor for density, ratio in ratios.items()}


def crossing(ratios: dict[float, float], margin: float) -> float:
    """The density up to which time ratios stay at or below a margin, between those that were measured.

    Args:
        ratios: seconds sparse / seconds dense, by ascending density.
    """
    before: tuple[float, float] | None = None
    for density, ratio in ratios.items():
        if ratio > margin:
            if before is None:
                return 0.0
            share = (margin - before[1]) / (ratio - before[1])
            return before[0] + share * (density - before[0])
        before = density, ratio
    return 1.0


@dataclass(frozen=True, eq=False)
class _Body:
    """Layers in one form; stands for the cache that a table keeps programs by."""

    table: Ops
    start: Any
    layers: Sequence[Layer]
    density: float | None

    def seconds(self) -> float:
        """Time of one token that follows another, whose traces in the caches it finds."""
        self.table.forced_density = self.density
        zero = np.zeros(1, np.int32)
        for _ in range(2):
            start = time.perf_counter()
            self.table.run(Step(zero, zero, zero, zero), cast("Any", self), self._record)
            last = time.perf_counter() - start
        return last

    def _record(self, step: Step) -> Array:
        x = self.table.embed(self.start, step.tokens)
        for layer in self.layers:
            normed = self.table.norm(x, layer.attn_norm)
            early = layer.router(normed, 1)
            x = layer.o(layer.qkv(normed)[0], x)
            x = layer.ffn(self.table.norm(x, layer.ffn_norm), x, early)
        return x


def _ratios(
    table: Ops, start: Any, dense: Sequence[Layer], sparse: Sequence[Layer], say: Callable[[], None]
) -> dict[float, float]:
    """Medians over rounds, in each of which all run in turn."""
    bodies = [_Body(table, start, dense, None), *(_Body(table, start, sparse, density) for density in DENSITIES)]
    for body in bodies:
        body.seconds()
    rounds: list[list[float]] = []
    began = time.perf_counter()
    while len(rounds) < ROUNDS[0] or (len(rounds) < ROUNDS[1] and time.perf_counter() - began < SECONDS):
        say()
        first, *others = (body.seconds() for body in bodies)
        rounds.append([other / first for other in others])
    return {density: statistics.median(column) for density, column in zip(DENSITIES, zip(*rounds))}
