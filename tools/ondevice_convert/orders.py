"""Which neurons lie together in groups: neighbours in the model, neurons that look alike, or that fire together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ondevice_convert.blocks import Groups
from ondevice_convert.clustering import balanced_clusters
from ondevice_convert.neurons import Floats, Neurons

ORDERS = ("clustered", "cofiring", "model")
"""By the directions of the gate's rows (up's without one); by the samples that neurons give much on; as they are."""
MOST = 1024
"""Samples that firing is looked at on."""


def groups_in(
    order: str, neurons: Neurons, block: int, x: Floats, progress: Callable[[int, int, str], None] | None = None
) -> Groups:
    """Groups of a layer's neurons.

    Args:
        order: of `ORDERS`.
        neurons: of the layer.
        block: neurons of a group, which divides the layer's.
        x: normed inputs [n, d]; only "cofiring" looks at them.
        progress: of the clustering.

    Returns:
        int64 [groups, block].
    """
    match order:
        case "clustered":
            rows = neurons.up if neurons.gate is None else neurons.gate
        case "cofiring":
            rows = firing(neurons, x[:: -(-len(x) // MOST)])
        case _:
            return np.arange(len(neurons.up)).reshape(-1, block)
    return balanced_clusters(rows, block, progress).reshape(-1, block)


def firing(neurons: Neurons, x: Floats) -> Floats:
    """What neurons give on samples, such that the likeness of two rows is the correlation of what they give.

    Args:
        x: normed inputs [n, d].

    Returns:
        float32 [D, n]: length of each neuron's output on each sample, less the neuron's mean.
    """
    sizes = np.empty((len(neurons.up), len(x)), np.float32)
    for part, h in neurons.chunks(x):
        # A sample on which all neurons give much says nothing about any of them.
        whole = np.abs(h) * neurons.reach
        sizes[:, part] = (whole / np.maximum(whole.mean(axis=1, keepdims=True), 1e-20)).T
    sizes -= sizes.mean(axis=1, keepdims=True)
    return sizes
