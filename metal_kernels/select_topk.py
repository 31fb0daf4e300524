"""The k units of the largest scores, exactly, as an ascending list on the device.

What it must move: a row of scores five times (four digits of a radix select and the listing), of which all but the
first come from the cache: 36,864 float32 are 147 KB. A sort would move them more often, and leave them in an order
that nobody needs.

Grid: a threadgroup for each row, as a list is written in order. A row's digits are counted in 256 bins of threadgroup
memory, from the top byte down, which leaves the k-th largest score to the bit; counts are whole numbers, so that the
order in which atomics add them is of no matter. Then the row is listed as in `select_threshold`. `select_votes` adds
up a batch's scores first, a thread for each unit, tokens in order. Heads that are chosen by groups take the group's
largest while loading.
"""

from __future__ import annotations

import mlx.core as mx

from metal_kernels.launch import absent, launch, need_float, need_gpu, tiles
from metal_kernels.lists import RowList, lists_of_mask_mlx, threads_for


def select_topk(scores: mx.array, k: int, shared: bool, group: int = 1, active: mx.array | None = None) -> RowList:
    """The k units of the largest scores; of equal ones the first.

    Args:
        scores: [N, M]; NaN counts as the smallest, and votes for nothing.
        k: from 1 to M / group.
        shared: one choice for all tokens, by the sums over tokens of relu(score); else one for each.
        group: neighbours that are one unit, by the largest of their scores.
        active: bool [N], tokens that vote; others are finished or padding.

    Returns:
        Ascending lists of length k: [N or 1, k].

    Raises:
        ValueError: no such k or group.
        RuntimeError: there is no Apple GPU.

    Source: Polar Sparsity (Shrestha et al. 2025), sections 4.1 and 4.2.
    """
    _need(scores, k, shared, group, active)
    need_gpu()
    width = scores.shape[1]
    if shared and len(scores):
        (scores,) = launch(
            "select_votes",
            {"scores": scores, "active": absent(active, scores)},
            {"sums": ((1, width), mx.float32)},
            (tiles(width, 256), 1, 1),
            256,
            {"ACTIVE": active is not None},
        )
    elif shared:
        scores = mx.zeros((1, width), mx.float32)
    n, units = len(scores), width // group
    if not n:
        return RowList(mx.zeros((0, k), mx.int32), mx.zeros((0,), mx.int32))
    return RowList(
        *launch(
            "select_topk",
            {"scores": scores, "k": k},
            {"indices": ((n, k), mx.int32), "counts": ((n,), mx.int32)},
            (n, 1, 1),
            threads_for(units),
            {"GROUP": group},
            ("places", "keys"),
        )
    )


def _need(scores: mx.array, k: int, shared: bool, group: int, active: mx.array | None) -> None:
    need_float("scores", scores)
    if scores.ndim != 2 or group < 1 or scores.shape[1] % group or (shared and group > 1):
        raise ValueError(
            f"scores {list(scores.shape)} in groups of {group}: groups divide the units of [N, M], and "
            "a shared choice is of single units"
        )
    if not 1 <= k <= scores.shape[1] // group:
        raise ValueError(f"k is {k}; choose from 1 to {scores.shape[1] // group}")
    if active is not None and (not shared or active.dtype != mx.bool_ or active.shape != scores.shape[:1]):
        raise ValueError(f"active must be bool [{len(scores)}], and belongs to a shared choice")


def select_topk_mlx(scores: mx.array, k: int, shared: bool, group: int = 1, active: mx.array | None = None) -> RowList:
    """`select_topk` in plain MLX, on any device."""
    _need(scores, k, shared, group, active)
    values = scores.astype(mx.float32)
    if shared:
        votes = mx.where(values > 0, values, 0)
        votes = votes if active is None else mx.where(active[:, None], votes, 0)
        values = votes.sum(axis=0, keepdims=True)
    values = mx.where(mx.isnan(values), -mx.inf, values)
    n, units = len(values), values.shape[1] // group
    if not n:
        return RowList(mx.zeros((0, k), mx.int32), mx.zeros((0,), mx.int32))
    values = values.reshape(n, units, group).max(axis=2)
    border = mx.sort(values, axis=1)[:, units - k, None]
    above, equal = values > border, values == border
    missing = k - above.sum(axis=1, keepdims=True)
    chosen = above | (equal & (mx.cumsum(equal.astype(mx.int32), axis=1) <= missing))
    return RowList(lists_of_mask_mlx(chosen).indices[:, :k], mx.full((n,), k, mx.int32))
