"""What routers of groups of neurons are fitted to: a layer's inputs, and what its groups make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ondevice.checkpoint.base import Checkpoint
from ondevice.errors import OptionError
from ondevice_convert.blocks import Groups, block_norms
from ondevice_convert.clustering import balanced_clusters
from ondevice_convert.neurons import Floats, Neurons
from ondevice_convert.samples import Samples

Progress = Callable[[int, int, str], None]
ORDERS = ("clustered", "model")
FEWEST = 40
"""Samples below which nothing is fitted."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some samples: inputs [n, d], and the lengths of the groups' outputs on them [n, groups]."""

    x: Floats
    norms: Floats


@dataclass(frozen=True, slots=True)
class BlockData:
    """A layer. The last fifth of the positions is held out; the eighth before it is not fitted on, but chooses.

    Args:
        neurons: its FFN.
        groups: their neurons [groups, block], by number in the model's own order.
        fit, choose, held_out: samples.
    """

    neurons: Neurons
    groups: Groups
    fit: Part
    choose: Part
    held_out: Part

    @classmethod
    def of(cls, base: Checkpoint, samples: Samples, layer: int, groups: Groups) -> BlockData:
        """Reads a layer and runs its FFN on its samples.

        Raises:
            OptionError: too few samples.
        """
        x, neurons = samples.of("ffn", layer), Neurons.of(base, layer)
        n = len(x)
        if n < FEWEST:
            raise OptionError(f"the text gives {n} positions, and routers need {FEWEST} or more; take a longer text")
        norms = block_norms(neurons, x, groups)
        ends = [0, n * 7 // 10, n * 4 // 5, n]
        parts = [Part(x[start:end], norms[start:end]) for start, end in zip(ends, ends[1:])]
        return cls(neurons, groups, *parts)


def groups_of(base: Checkpoint, layer: int, block: int, order: str, progress: Progress | None = None) -> Groups:
    """Groups of a layer's neurons.

    Args:
        order: "model" for neighbours in the model, "clustered" for neurons whose rows of the gate (of up where there is
            no gate) point in like directions.

    Returns:
        int64 [groups, block].
    """
    neurons = np.arange(base.spec.d_ff)
    if order == "clustered":
        own = Neurons.of(base, layer)
        neurons = balanced_clusters(own.up if own.gate is None else own.gate, block, progress)
    return neurons.reshape(-1, block)


def part_of(progress: Progress | None, layer: int, n_layers: int, label: str) -> None:
    """Says which layer is at work."""
    if progress:
        progress(layer, n_layers, label)


def missed(scores: Floats, norms: Floats, density: float) -> float:
    """Part of the squares of the groups' outputs that is left out where a part of the scores, the largest, run.

    Args:
        scores, norms: [n, groups].
    """
    count = scores.size - round(density * scores.size)
    if not count:
        return 0.0
    squares = norms.ravel() ** 2
    left = np.argpartition(scores, count - 1, axis=None)[:count]
    return float(squares[left].sum(dtype=np.float64) / max(squares.sum(dtype=np.float64), 1e-30))
