"""Neurons in clusters of equal size, so that those which lie side by side are alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from ondevice.errors import OptionError

Floats = NDArray[np.float32]
EXACT_UP_TO = 4096
"""Neurons up to which the last assignment is the best possible one."""
WIDTH = 256
"""Directions that distances are taken in, where rows have more than twice as many."""
ROUNDS = 12
SETTLED = 1e-3
"""Rise of the mean likeness, as a part of it, below which another round is not worth it."""
BIDDING = 400
"""Rounds of bidding after which those who are left take what is free."""


def balanced_clusters(
    rows: Floats, size: int, progress: Callable[[int, int, str], None] | None = None, seed: int = 0
) -> NDArray[np.int64]:
    """An order of neurons in which each `size` neighbours are a cluster: k-means with clusters of equal size.

    Args:
        rows: [D, d], one for each neuron; only their directions count.
        size: of a cluster, which must divide D.
        progress: called with (rounds done, most rounds, "clustering neurons").
        seed: of the first centres.

    Returns:
        int64 [D]: which neuron comes where. Clusters are sorted by their first neuron, and neurons in a cluster.

    Raises:
        OptionError: the size does not divide D.

    Source: MoEfication (Zhang et al. 2022), section 3.1; D2DMoE (Szatkowski et al. 2024), section 3.2.
    """
    count = len(rows)
    if count % size:
        raise OptionError(f"clusters of {size} do not divide {count} neurons; take a divisor of {count}")
    if size in (1, count):
        return np.arange(count)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    random = np.random.default_rng(seed)
    points = _narrowed(rows / np.maximum(lengths, np.finfo(np.float32).tiny), random)
    centres = points[random.permutation(count)[: count // size]]
    best = np.arange(count) // size
    highest = -np.inf
    for done in range(ROUNDS):
        if progress:
            progress(done, ROUNDS, "clustering neurons")
        likeness = points @ centres.T
        mine = _bid(likeness, size)
        centres = _centres(points, mine, size)
        # The length of a sum of unit vectors says how alike they are.
        alike = float((points * centres[mine]).sum())
        if alike <= highest * (1 + SETTLED):
            break
        best, highest = mine, alike
    if count <= EXACT_UP_TO:
        likeness = points @ _centres(points, best, size).T
        _, seats = scipy.optimize.linear_sum_assignment(np.repeat(likeness, size, axis=1), maximize=True)
        best = seats // size
    if progress:
        progress(ROUNDS, ROUNDS, "clustering neurons")
    clusters = np.sort(np.argsort(best, kind="stable").reshape(-1, size), axis=1)
    return clusters[np.argsort(clusters[:, 0])].ravel()


def _narrowed(rows: Floats, random: np.random.Generator) -> Floats:
    """Rows in the directions in which they differ most, about, where there are many directions.

    Source: Halko, Martinsson and Tropp, Finding structure with randomness (2011), algorithm 4.4 with one iteration.
    """
    if rows.shape[1] <= 2 * WIDTH:
        return rows
    sketch = rows @ random.standard_normal((rows.shape[1], WIDTH), np.float32)
    basis = np.linalg.qr(rows.T @ sketch)[0]
    narrow: Floats = rows @ basis
    return narrow


def _centres(points: Floats, mine: NDArray[np.int64], size: int) -> Floats:
    """Unit vectors in the middle of clusters."""
    members = points[np.argsort(mine, kind="stable")].reshape(-1, size, points.shape[1])
    sums = members.sum(axis=1)
    middle: Floats = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-20)
    return middle


def _bid(likeness: Floats, size: int) -> NDArray[np.int64]:
    """Clusters [D] of neurons, none with more than `size`, with a large sum of likeness [D, clusters].

    Neurons without a cluster bid for the one that they like best less its price, as much as makes it no better than
    their second choice. A cluster keeps its highest bidders, and the lowest of these is its price.

    Source: Bertsekas and Castanon, The auction algorithm for the transportation problem (1989), section 3.
    """
    count, clusters = likeness.shape
    step = np.float32(0.02 * likeness.std() + 1e-7)
    prices = np.zeros(clusters, np.float32)
    mine, bids = np.full(count, -1), np.zeros(count, np.float32)
    for _ in range(BIDDING):
        free = np.flatnonzero(mine < 0)
        if not len(free):
            return mine
        worth = likeness[free] - prices
        choice = worth.argmax(axis=1)
        at = np.arange(len(free))
        first = worth[at, choice]
        worth[at, choice] = -np.inf
        mine[free] = choice
        bids[free] = prices[choice] + (first - worth.max(axis=1)) + step
        # Bidders of a cluster from the highest down; of equal ones the earlier neuron.
        order = np.lexsort((-bids, mine))
        starts = np.searchsorted(mine[order], np.arange(clusters + 1))
        rank = np.arange(count) - starts[mine[order]]
        mine[order[rank >= size]] = -1
        full = np.flatnonzero(np.diff(starts) >= size)
        prices[full] = bids[order[starts[full] + size - 1]]
    return _seated(likeness, mine, size)


def _seated(likeness: Floats, mine: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Gives each neuron that is left the best cluster that has room."""
    room = size - np.bincount(mine[mine >= 0], minlength=likeness.shape[1])
    for neuron in np.flatnonzero(mine < 0):
        choice = int(np.where(room > 0, likeness[neuron], -np.inf).argmax())
        mine[neuron] = choice
        room[choice] -= 1
    return mine
