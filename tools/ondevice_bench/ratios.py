"""From the samples of programs that ran in turn to ratios."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

Rounds = Sequence[Sequence[float]]
"""Samples of each round, tokens per second."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One test under one condition.

    Args:
        condition, test: names.
        ours, theirs: medians of all samples, tokens per second.
        peer: the variant of the peer that was fastest.
        ratio: ours / theirs.
        low, high: the smallest and the largest of the rounds' own ratios.
    """

    condition: str
    test: str
    ours: float
    theirs: float
    peer: str
    ratio: float
    low: float
    high: float


def compare(condition: str, test: str, ours: Rounds, peers: Mapping[str, Rounds]) -> Comparison:
    """Compares ours with the best of the peer's variants.

    Args:
        ours: a round must have run next to the round of the same index of the peers.
        peers: by variant.
    """
    best = max(peers, key=lambda name: median(peers[name]))
    each = [statistics.median(a) / statistics.median(b) for a, b in zip(ours, peers[best], strict=True)]
    mine, theirs = median(ours), median(peers[best])
    return Comparison(condition, test, mine, theirs, best, mine / theirs, min(each), max(each))


def median(rounds: Rounds) -> float:
    """Median of all samples."""
    return statistics.median(chain.from_iterable(rounds))
