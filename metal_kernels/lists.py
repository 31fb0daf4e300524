"""Lists of units on the device: fixed length, so that nothing waits for the host to learn how many there are."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from metal_kernels.launch import SIMD, launch, need_gpu, tiles


class RowList(NamedTuple):
    """Units that each token runs, or all tokens alike.

    Args:
        indices: int32 [N or 1, length]; entries beyond the count are undefined and never read.
        count: int32 [N or 1].
    """

    indices: mx.array
    count: mx.array  # type: ignore[assignment]


def threads_for(units: int) -> int:
    """Threads of a threadgroup that goes over a row of so many units."""
    return min(1024, tiles(max(units, 1), SIMD) * SIMD)


def lists_of_mask(mask: mx.array) -> RowList:
    """The units of each row of a mask, ascending.

    Args:
        mask: bool [R, M].

    Returns:
        Lists of length M.

    Raises:
        RuntimeError: there is no Apple GPU.
    """
    need_gpu()
    rows, units = mask.shape
    if not rows or not units:
        return RowList(mx.zeros((rows, units), mx.int32), mx.zeros((rows,), mx.int32))
    outputs = {"indices": ((rows, units), mx.int32), "counts": ((rows,), mx.int32)}
    return RowList(*launch("list_mask", {"mask": mask}, outputs, (rows, 1, 1), threads_for(units), {}, ("places",)))


def lists_of_mask_mlx(mask: mx.array) -> RowList:
    """`lists_of_mask` in plain MLX: entries beyond the count are the units that are not listed."""
    units = mask.shape[1]
    at = mx.arange(units, dtype=mx.int32)
    # No two keys are equal, for sorting need not be stable.
    order = mx.argsort(mx.where(mask, at, at + units), axis=1)
    return RowList(order.astype(mx.int32), mask.astype(mx.int32).sum(axis=1))


def mask_of_lists(rows: RowList, units: int) -> mx.array:
    """The same selection as a mask: bool [N or 1, units]."""
    n, length = rows.indices.shape
    live = mx.arange(length)[None] < rows.count[:, None]
    at = mx.where(live, rows.indices, units)
    mask = mx.zeros((n, units + 1), mx.uint8)
    if length:
        mask = mx.put_along_axis(mask, at, mx.array(1, mx.uint8), axis=1)
    return mask[:, :units] != 0
