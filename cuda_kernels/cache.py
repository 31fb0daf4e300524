"""Keys and values as attention reads them: pages, or a piece for each sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cuda_kernels.launch import need_float

TILE = 64
"""Keys that are read at a time."""


@dataclass(frozen=True, slots=True)
class KvView:
    """What a step of decoding may see.

    Args:
        keys, values: [pages, page, kv heads, head dim], or [B, longest, kv heads, head dim] without a table. Any
            strides, such as those of a layer's part of a larger array, but the last one must be 1.
        lengths: int32 [B], keys that each sequence sees, its own among them; on the device. What lies beyond them is
            never used.
        block_table: int32 [B, pages of a sequence], or None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    block_table: torch.Tensor | None = None

    @property
    def page(self) -> int:
        return self.keys.shape[1]

    @property
    def longest(self) -> int:
        """The most keys that a sequence can have."""
        return self.page * (1 if self.block_table is None else self.block_table.shape[1])

    def check(self, q: torch.Tensor) -> None:
        """Raises ValueError where queries [B, H, dh] and this do not fit."""
        for name, tensor in (("q", q), ("keys", self.keys), ("values", self.values)):
            need_float(name, tensor)
        same = self.keys.shape == self.values.shape and q.dtype == self.keys.dtype == self.values.dtype
        if self.keys.ndim != 4 or not same or self.keys.stride(3) != 1 or self.values.stride(3) != 1:
            raise ValueError(
                f"keys {list(self.keys.shape)} {self.keys.dtype} and values {list(self.values.shape)} "
                f"{self.values.dtype} must be [pages or B, positions, kv heads, head dim], of q's type {q.dtype}, with "
                "neighbouring dimensions of a head side by side"
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
    def tile(self) -> int:
        """Keys of a tile: it never crosses a page."""
        return TILE if self.block_table is None else min(TILE, self.page)


@triton.jit
def piece_of(table, sequence, position, table_stride, PAGE: tl.constexpr, PAGED: tl.constexpr):
    """The page of a position, and where in it that lies; of a table-less cache the sequence and the position."""
    if PAGED:
        page = tl.load(table + sequence * table_stride + position // PAGE).to(tl.int64)
        inside = position % PAGE
    else:
        page = sequence
        inside = position
    return page, inside


def visible(cache: KvView, batch: int, window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values [B, longest, kv heads, dh] in float32, 0 where not seen, and what is seen, bool [B, longest]."""
    at = torch.arange(cache.longest, device=cache.keys.device)[None]
    lengths = cache.lengths[:, None]
    seen = (at < lengths) & ((at >= lengths - window) if window else True)
    if cache.block_table is None:
        both = [x[:batch].float() for x in (cache.keys, cache.values)]
    else:
        # Pages that were never filled may have any number in the table.
        pages = torch.where(seen.unflatten(1, (-1, cache.page)).any(2), cache.block_table, 0).long()
        both = [x[pages].flatten(1, 2).float() for x in (cache.keys, cache.values)]
    keys, values = (torch.where(seen[:, :, None, None], x, 0) for x in both)
    return keys, values, seen
