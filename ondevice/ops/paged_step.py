"""What a step is to a table that attends sequence by sequence over pages laid end to end, in NumPy's arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.ops.base import Step

Part = tuple[NDArray[np.int64] | None, NDArray[np.int32], NDArray[np.int32]]
"""Tokens that are attended to together: their rows of the step, None for all in order; slots [S]; positions [S, n]."""


def is_single(step: Step) -> bool:
    """Whether each token is of another sequence, as in decoding."""
    return len(np.unique(step.slots)) == len(step.slots)


def parts_of(step: Step) -> Iterator[Part]:
    """One part for a decode step or a prompt; one for each sequence where a step is neither."""
    slots = np.unique(step.slots)
    if is_single(step):
        yield None, step.slots, step.positions[:, None]
    elif len(slots) == 1:
        yield None, slots, step.positions[None]
    else:
        for slot in slots:
            rows = np.flatnonzero(step.slots == slot)
            yield rows, np.array([slot], np.int32), step.positions[rows][None]


def order_of(parts: list[Part]) -> NDArray[np.int64] | None:
    """Which row of the parts' joined results is which token; None where they are in order."""
    return np.argsort(np.concatenate([rows for rows, _, _ in parts if rows is not None])) if len(parts) > 1 else None


def flat_places(
    table: NDArray[np.int32], slots: NDArray[np.int32], positions: NDArray[Any], page: int
) -> NDArray[np.int64]:
    """Places of positions where all pages lie one after the other. table: of a KVCache's layer."""
    return table[slots, positions // page].astype(np.int64) * page + positions % page
