"""Groups of neurons that run or not as one: what they give on samples, and what is lost without some of them.

Groups are given by their neurons, int [groups, block], so that no weight is copied into another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ondevice_convert.fitted import LayerFit
from ondevice_convert.neurons import Floats, Neurons

Mask = NDArray[np.bool_]
Groups = NDArray[np.int64]


def block_norms(neurons: Neurons, x: Floats, groups: Groups) -> Floats:
    """Length of what each group adds to the residual stream.

    Args:
        neurons: of a layer.
        x: normed inputs [n, d].
        groups: their neurons [groups, block].

    Returns:
        float32 [n, groups].
    """
    norms = np.empty((len(x), len(groups)), np.float32)
    if groups.shape[1] == 1:
        reach = neurons.reach
        for part, h in neurons.chunks(x):
            norms[part] = (np.abs(h) * reach)[:, groups[:, 0]]
        return norms
    # By products of a group's columns of down with each other: far fewer than the outputs have values.
    products = [neurons.down[:, members].T @ neurons.down[:, members] for members in groups]
    for part, h in neurons.chunks(x):
        for i, members in enumerate(groups):
            own = h[:, members]
            squares = np.einsum("nb,nb->n", own @ products[i], own)
            norms[part, i] = np.sqrt(np.maximum(squares, 0))
    return norms


def lost_without(neurons: Neurons, x: Floats, groups: Groups, masks: Sequence[Mask]) -> list[float]:
    """Part of the output's square on samples [n, d] that is lost where only some groups run.

    Args:
        masks: bool [n, groups] of those that run; one answer for each.
    """
    whole, missing = 0.0, [0.0] * len(masks)
    for part, h in neurons.chunks(x):
        whole += float(((h @ neurons.down.T) ** 2).sum(dtype=np.float64))
        for i, mask in enumerate(masks):
            left = np.empty(h.shape, bool)
            left[:, groups.ravel()] = np.repeat(~mask[part], groups.shape[1], axis=1)
            missing[i] += float((((h * left) @ neurons.down.T) ** 2).sum(dtype=np.float64))
    return [part / whole if whole else 0.0 for part in missing]


def border_at(scores: Floats, density: float) -> float:
    """The threshold above which a part of all scores lies, between the scores next to it; below all of them for 1."""
    left = scores.size - round(density * scores.size)
    if not left:
        return -np.inf
    if left == scores.size:
        return float(scores.max())
    below, above = np.partition(scores, [left - 1, left], axis=None)[left - 1 : left + 1]
    return float(below + (above - below) / 2)


def largest(scores: Floats, count: int) -> Mask:
    """The `count` largest of all scores [n, groups]."""
    mask = np.zeros(scores.size, bool)
    if count:
        mask[np.argpartition(scores, scores.size - count, axis=None)[scores.size - count :]] = True
    return mask.reshape(scores.shape)


def judge(
    layer: int, neurons: Neurons, x: Floats, groups: Groups, norms: Floats, kept: Mask, seed: int = 0
) -> LayerFit:
    """What a selector's choices come to.

    Args:
        layer: its number.
        x: samples [n, d] that the selector was not fitted on.
        norms: of the groups' outputs on them [n, groups].
        kept: what the selector chooses, bool [n, groups].
        seed: of the random choices.
    """
    count = int(kept.sum())
    wanted = largest(norms, count)
    random = largest(np.random.default_rng(seed).random(norms.shape, np.float32), count)
    lost, oracle, chance = lost_without(neurons, x, groups, [kept, wanted, random])
    recall = float((kept & wanted).sum() / count) if count else 1.0
    return LayerFit(layer, count / kept.size, recall, lost, oracle, chance, groups.shape[1])
