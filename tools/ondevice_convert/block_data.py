"""What routers of groups of neurons are fitted to: a layer's inputs, and what its groups make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ondevice.checkpoint.base import Checkpoint
from ondevice.errors import OptionError
from ondevice_convert.blocks import Groups, block_norms
from ondevice_convert.neurons import Floats, Neurons
from ondevice_convert.orders import groups_in
from ondevice_convert.samples import Samples

Progress = Callable[[int, int, str], None]
FEWEST = 40
"""Samples below which nothing is fitted."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some samples: inputs [n, d], and the lengths of the groups' outputs on them [n, groups]."""

    x: Floats
    norms: Floats


@dataclass(frozen=True, slots=True)
class BlockData:
    """A layer. The last fifth of the positions is held out; the tenth before it is not fitted on, but chooses.

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
    def of(
        cls,
        base: Checkpoint,
        samples: Samples,
        layer: int,
        block: int,
        order: str,
        groups: Groups | None = None,
    ) -> BlockData:
        """Reads a layer, forms its groups and runs its FFN on its samples.

        Args:
            block: neurons of a group.
            order: of `ORDERS`.
            groups: that were formed before.

        Raises:
            OptionError: too few samples.
        """
        x = samples.of("ffn", layer)
        n = len(x)
        if n < FEWEST:
            raise OptionError(f"the text gives {n} positions, and routers need {FEWEST} or more; take a longer text")
        neurons = Neurons.of(base, layer)
        ends = [0, n * 7 // 10, n * 4 // 5, n]
        if groups is None:
            groups = groups_in(order, neurons, block, x[: ends[1]])
        norms = block_norms(neurons, x, groups)
        parts = [Part(x[start:end], norms[start:end]) for start, end in pairwise(ends)]
        return cls(neurons, groups, *parts)


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
