"""Keys and values as attention reads them: pages, or a piece for each sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metal_kernels.launch import need_float

CHUNK = 256
"""Keys of a threadgroup, and of a partial sum."""
SIMDGROUPS = 4
"""Simdgroups that share a chunk, 32 keys at a time."""


@dataclass(frozen=True, slots=True)
class KvView:
    """What a step of decoding may see.

    Args:
        keys, values: [pages, page, kv heads, head dim], or [B, longest, kv heads, head dim] without a table. Any
            strides: a part of a larger array, or heads and positions exchanged, is read where it lies. Fastest where
            neighbouring dimensions of a head lie side by side.
        lengths: int32 [B], keys that each sequence sees, its own among them. What lies beyond them is never used.
        block_table: int32 [B, pages of a sequence], or None.
    """

    keys: mx.array
    values: mx.array
    lengths: mx.array
    block_table: mx.array | None = None

    @property
    def page(self) -> int:
        return self.keys.shape[1]

    @property
    def longest(self) -> int:
        """The most keys that a sequence can have."""
        return self.page * (1 if self.block_table is None else self.block_table.shape[1])

    def check(self, q: mx.array) -> None:
        """Raises ValueError where queries [B, H, dh] and this do not fit."""
        for name, array in (("q", q), ("keys", self.keys), ("values", self.values)):
            need_float(name, array)
        same = self.keys.shape == self.values.shape and q.dtype == self.keys.dtype == self.values.dtype
        if self.keys.ndim != 4 or not same:
            raise ValueError(
                f"keys {list(self.keys.shape)} {self.keys.dtype} and values {list(self.values.shape)} "
                f"{self.values.dtype} must be [pages or B, positions, kv heads, head dim], of q's type {q.dtype}"
            )
        if q.ndim != 3 or q.shape[2] != self.keys.shape[3] or q.shape[1] % self.keys.shape[2]:
            raise ValueError(
                f"q is {list(q.shape)}; it must be [B, heads, {self.keys.shape[3]}], a multiple of "
                f"{self.keys.shape[2]} heads"
            )
        batch, table = len(q), self.block_table
        if self.lengths.shape != (batch,) or (len(self.keys) < batch if table is None else len(table) != batch):
            raise ValueError(
                f"lengths {list(self.lengths.shape)} and the table, or the keys, must be of {batch} sequences, as q is"
            )
        if table is not None and (self.page % 16 or self.page & (self.page - 1)):
            raise ValueError(f"pages have {self.page} positions; take a power of two from 16 on")

    @property
    def table(self) -> mx.array:
        """The table, or what stands for it where there is none, in one piece."""
        return mx.contiguous(self.lengths[:, None] if self.block_table is None else self.block_table)

    @property
    def template(self) -> dict[str, Any]:
        """Constants of a kernel that reads this."""
        paged = self.block_table is not None
        return {"PAGED": paged, "PAGE": self.page if paged else 1}


def tile_of(dims: int, heads: int, size: int) -> tuple[int, int, int]:
    """How a simdgroup shares the dimensions of a key.

    Args:
        dims: of a key, or those of it that are read.
        heads: query heads that share the key.
        size: bytes of a number.

    Returns:
        Dimensions of a lane (sixteen bytes, or more where 32 lanes would not do); lanes of a key, a power of two;
        query heads of a simdgroup, for which the registers suffice.
    """
    values = 16 // size
    while dims > 32 * values:
        values *= 2
    lanes = 1
    while lanes * values < dims:
        lanes *= 2
    return values, lanes, max(1, min(heads, 64 // values if values > 8 else 8))


def visible(cache: KvView, batch: int, window: int) -> tuple[mx.array, mx.array, mx.array]:
    """Keys and values [B, longest, kv heads, dh] in float32, 0 where not seen, and what is seen, bool [B, longest]."""
    at = mx.arange(cache.longest)[None]
    lengths = cache.lengths[:, None]
    seen = at < lengths
    if window:
        seen = seen & (at >= lengths - window)
    if cache.block_table is None:
        both = [x[:batch] for x in (cache.keys, cache.values)]
    else:
        # Pages that were never filled may have any number in the table.
        pages = mx.where(seen.reshape(batch, -1, cache.page).any(axis=2), cache.block_table, 0)
        both = [x[pages].flatten(1, 2) for x in (cache.keys, cache.values)]
    keys, values = (mx.where(seen[:, :, None, None], x.astype(mx.float32), 0) for x in both)
    return keys, values, seen
