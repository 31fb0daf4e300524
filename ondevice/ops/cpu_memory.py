"""Memory for a model's weights, in the order in which they are used."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
from numpy.typing import NDArray

SMALLEST, LARGEST = 1 << 18, 1 << 25
HUGE = 1 << 21
"""Bytes of a huge page, and from where on chunks consist of them."""
LINE = 64
SPARE = 128
"""Bytes behind each piece, because kernels ask for weights ahead of their use."""


class WeightMemory:
    """Chunks of memory from which pieces are cut. A chunk goes back to the system when all its pieces are gone.

    Pages that were never written to cost nothing, so what is left of a chunk does not either.
    """

    def __init__(self) -> None:
        self._chunk = np.empty(0, np.uint8)
        self._at = self._total = 0

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """Bytes that start on a cache line; their contents are undefined.

        Raises:
            MemoryError: the system has no such amount.
        """
        needed = -(-(nbytes + SPARE) // LINE) * LINE
        if needed > len(self._chunk) - self._at:
            # As much again as there is already: small for small models, few chunks for large ones.
            self._chunk, self._at = _pages(max(needed, min(max(self._total, SMALLEST), LARGEST))), 0
        piece = self._chunk[self._at : self._at + nbytes]
        self._at += needed
        self._total += needed
        return piece


def _pages(nbytes: int) -> NDArray[np.uint8]:
    """At least so many bytes of new memory, on huge pages where the system has them and they would be filled.

    Tables of 4 KiB pages for gigabytes do not fit the processor's caches, and NumPy asks for larger ones only for
    arrays of more than 4 MiB.
    """
    huge = nbytes >= HUGE and hasattr(mmap, "MADV_HUGEPAGE")
    unit = HUGE if huge else mmap.PAGESIZE
    size = -(-nbytes // unit) * unit
    try:
        # A unit more, since the system need not begin on one.
        area = mmap.mmap(-1, size + (unit if huge else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as e:
        raise MemoryError(f"{nbytes} bytes for weights") from e
    if huge:
        with contextlib.suppress(OSError):  # a system built without them
            area.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(area, np.uint8)
    start = -whole.ctypes.data % unit
    return whole[start : start + size]


def padded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 with zeros up to a whole vector."""
    out = np.zeros(-(-len(values) // 16) * 16, np.float32)
    out[: len(values)] = values
    return out
