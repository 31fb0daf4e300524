"""What a selector has chosen: handed from the op table to the op table, opaque to whoever carries it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Selection:
    """Neurons, blocks of neurons or inputs that a step's tokens run.

    Args:
        mask: the table's own record of them, one row for each token, or one for all.
        units: how many there are to choose from.
        shared: whether all tokens have the one row.
        values: [N, units], factor of each unit where it has been computed already (the activated gate); 0 where a unit
            is not chosen.
    """

    mask: Any
    units: int
    shared: bool
    values: Any = None

    def with_values(self, values: Any) -> Selection:
        """The same units with their factors [N, units]."""
        return replace(self, values=values)


@dataclass(frozen=True, slots=True)
class HeadSelection:
    """Heads of attention that each token runs.

    Args:
        index: the table's own record: for each token the numbers of its units.
        kept: units that each token runs.
        group: query heads of a unit: 1, or those that share a KV head.
    """

    index: Any
    kept: int
    group: int
