"""Tables of selected neurons as CPU kernels read them (`cpu_kernels/table.py`), and compact rows, in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def table_of(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The table of the neurons whose bit is set; what no reader may look at is -1."""
    groups = -(-len(mask) // 32)
    table = np.full(16 + 34 * groups, -1, np.int32)
    neurons = np.flatnonzero(mask)
    entries = np.unique(neurons // 32)
    table[:2] = len(entries), len(neurons)
    for e, group in enumerate(entries):
        some = neurons[neurons // 32 == group]
        padded = np.pad(some, (0, -len(some) % 4), mode="edge")
        table[16 + e], table[16 + groups + e] = group, len(some)
        at = 16 + 2 * groups + 32 * e
        table[at : at + len(padded)] = padded
    return table


def compact(x: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The row's selected values by entry, 32 each, with zeros behind; NaN where nobody may look."""
    out = np.full(-(-len(mask) // 32) * 32, np.nan, np.float32)
    neurons = np.flatnonzero(mask)
    for e, group in enumerate(np.unique(neurons // 32)):
        some = neurons[neurons // 32 == group]
        out[32 * e : 32 * e + 32] = np.pad(x[some], (0, 32 - len(some)))
    return out
