"""Bookkeeping of a paged KV cache: which pages belong to which sequence, and how far each is filled.

The keys and values themselves lie in the op table's own storage (`pages`), whose inner layout only the table knows.
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

    Attributes:
        block_table: int32 [slots, pages per slot], page of each 64 positions; 0 where none is allocated yet.
        lengths: int32 [slots], positions filled.
        pages: the table's storage.
    """

    page = PAGE

    def __init__(self, ops: Ops, spec: ModelSpec, slots: int, capacity: int) -> None:
        spec.check_context(capacity)
        self.slots, self.capacity = slots, capacity
        per_slot = -(-capacity // PAGE)
        self.block_table: NDArray[np.int32] = np.zeros((slots, per_slot), np.int32)
        self.lengths: NDArray[np.int32] = np.zeros(slots, np.int32)
        self._held = [0] * slots
        self._free = list(range(slots * per_slot - 1, -1, -1))
        self.pages: Any = ops.new_pages(spec, slots * per_slot, PAGE)

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

    def truncate(self, slot: int, length: int) -> None:
        """Forgets positions from `length` on and frees the pages that held only them."""
        keep = -(-length // PAGE)
        while self._held[slot] > keep:
            self._held[slot] -= 1
            self._free.append(int(self.block_table[slot, self._held[slot]]))
            self.block_table[slot, self._held[slot]] = 0
        self.lengths[slot] = min(length, int(self.lengths[slot]))
