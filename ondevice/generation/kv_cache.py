"""Bookkeeping of a paged KV cache: which pages belong to which sequence, and how far each is filled.

The keys and values themselves lie in the op table's own storage (`pages`), whose inner layout only the table knows.
Layers whose tokens see a window of keys rotate, in tables that can: a slot has a ring of pages there, and what no later
token will see is overwritten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ondevice.errors import ContextLengthError

if TYPE_CHECKING:
    from ondevice.ops.base import Ops
    from ondevice.spec import ModelSpec

PAGE = 64


class KVCache:
    """Keys and values of several sequences.

    Args:
        ops: the table whose storage is used.
        spec: the model.
        slots: sequences held at once.
        capacity: positions per sequence; never overrun.
        together: most tokens of a sequence in a step, for which a ring has room; None for any number: no layer rotates.

    Attributes:
        block_table: int32 [slots, pages per slot], page of each 64 positions; 0 where none is allocated yet.
        rings: of each layer, pages of a slot's ring; 0 where its pages are those of `block_table`.
        lengths: int32 [slots], positions filled.
        pages: the table's storage.
    """

    page = PAGE

    def __init__(self, ops: Ops, spec: ModelSpec, slots: int, capacity: int, together: int | None = None) -> None:
        spec.check_context(capacity)
        self.slots, self.capacity, self._together = slots, capacity, together
        per_slot = -(-capacity // PAGE)
        self.block_table: NDArray[np.int32] = np.zeros((slots, per_slot), np.int32)
        self.lengths: NDArray[np.int32] = np.zeros(slots, np.int32)
        self._held = [0] * slots
        self._free = list(range(slots * per_slot - 1, -1, -1))
        self._windows = spec.windows
        self.rings = [0] * spec.n_layers
        if ops.rotates and together is not None:
            self.rings = [_ring(window, together, per_slot) for window in spec.windows]
        self._ring_tables = {ring: _ring_table(slots, per_slot, ring) for ring in set(self.rings) if ring}
        # Positions of each slot that were ever written since it was empty, what was taken back included.
        self._written = np.zeros(slots, np.int64)
        self.pages: Any = ops.new_pages(spec, [slots * (ring or per_slot) for ring in self.rings], PAGE)

    def table(self, layer: int) -> NDArray[np.int32]:
        """int32 [slots, pages per slot], a layer's page of each 64 positions. Pages of a ring come again and again."""
        return self._ring_tables[self.rings[layer]] if self.rings[layer] else self.block_table

    @property
    def positions(self) -> int:
        """That there is memory for, of all slots and layers together."""
        return sum(self.slots * (ring or self.block_table.shape[1]) * PAGE for ring in self.rings)

    def reserve(self, slot: int, tokens: int) -> None:
        """Makes room for `tokens` more positions of a slot.

        Raises:
            ContextLengthError: the slot's capacity would be exceeded; nothing has changed.
        """
        need = int(self.lengths[slot]) + tokens
        if need > self.capacity:
            raise ContextLengthError(
                f"{need} tokens do not fit the cache of {self.capacity}; start anew or load with a larger context"
            )
        while self._held[slot] * PAGE < need:
            self.block_table[slot, self._held[slot]] = self._free.pop()
            self._held[slot] += 1

    def touch(self, slots: NDArray[np.int32], positions: NDArray[np.int32]) -> None:
        """Notes that a step is about to write positions of slots, both int32 [N].

        Raises:
            ValueError: more tokens of a sequence than rings have room for; nothing has been written.
        """
        if not self._ring_tables:
            return
        most = int(np.bincount(slots).max()) if len(slots) else 0
        if self._together is not None and most > self._together:
            raise ValueError(f"a step has {most} tokens of one sequence; this cache was made for {self._together}")
        np.maximum.at(self._written, slots, positions + 1)

    def truncate(self, slot: int, length: int) -> int:
        """Forgets positions from `length` on and frees the pages that held only them.

        Returns:
            Positions that are left: `length` if there were as many; 0 where a ring has overwritten what the next
            token would see. A ring goes back by as many tokens as a step may have, from the last that was written.
        """
        length = min(length, int(self.lengths[slot]))
        if not all(self._rewinds(slot, length, *pair) for pair in zip(self._windows, self.rings)):
            length = 0
        if not length:
            self._written[slot] = 0
        keep = -(-length // PAGE)
        while self._held[slot] > keep:
            self._held[slot] -= 1
            self._free.append(int(self.block_table[slot, self._held[slot]]))
            self.block_table[slot, self._held[slot]] = 0
        self.lengths[slot] = length
        return length

    def _rewinds(self, slot: int, length: int, window: int, ring: int) -> bool:
        """Whether a layer still has all that a token at position `length` sees."""
        return not ring or max(length + 1 - window, 0) >= int(self._written[slot]) - ring * PAGE


def _ring(window: int, together: int, per_slot: int) -> int:
    """Pages of a ring: for the window of each token of a step, with one more where both ends share a page.

    0 where a ring would be no smaller than pages for all positions.
    """
    pages = -(-(window + together - 1) // PAGE) + 1
    return pages if window and pages < per_slot else 0


def _ring_table(slots: int, per_slot: int, ring: int) -> NDArray[np.int32]:
    turns = np.arange(per_slot, dtype=np.int32) % ring
    return turns + ring * np.arange(slots, dtype=np.int32)[:, None]
