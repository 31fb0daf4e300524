"""Tables of picked neurons, as kernels make them at run time, from lists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def make_table(neurons: Sequence[int] | NDArray[np.integer], total: int) -> NDArray[np.int32]:
    """The table of some of `total` neurons, in any order and with repetitions."""
    groups = -(-total // 32)
    chosen = np.unique(np.asarray(neurons, np.int64))
    table = np.full(16 + 34 * groups, -(10**6), np.int32)
    entries, counts = np.unique(chosen // 32, return_counts=True)
    table[0], table[1] = len(entries), len(chosen)
    table[16 : 16 + len(entries)] = entries
    table[16 + groups : 16 + groups + len(entries)] = counts
    lists = table[16 + 2 * groups :].reshape(groups, 32)
    for row, group, count in zip(lists, entries, counts):
        mine = chosen[chosen // 32 == group]
        row[: -(-count // 4) * 4] = np.pad(mine, (0, -count % 4), mode="edge")
    return table


def listed(neurons: Sequence[int] | NDArray[np.integer], total: int) -> NDArray[np.int64]:
    """[entries, 32] neurons of that table, -1 behind the last of each entry."""
    chosen = np.unique(np.asarray(neurons, np.int64))
    entries = [chosen[chosen // 32 == group] for group in np.unique(chosen // 32)]
    out = np.full((len(entries), 32), -1, np.int64)
    for row, mine in zip(out, entries):
        row[: len(mine)] = mine
    return out
