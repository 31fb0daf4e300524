"""Units whose score is above a threshold, compacted on the device into a list of fixed length.

What it must move: a row of scores once, or twice where the threshold is relative to the largest, and 4 bytes for each
unit that is listed. Grid: a threadgroup for each row, since a list is written in order; up to 1024 units at a time,
whose places are prefix sums of a simdgroup and of 32 totals in threadgroup memory. Rows are a few hundred units (LTE,
D2DMoE) to some ten thousand: microseconds for a threadgroup. And nothing is read by the host: the list is as long as
there are units, and its count stays on the device.
"""

from __future__ import annotations

import mlx.core as mx

from metal_kernels.launch import launch, need_float, need_gpu
from metal_kernels.lists import RowList, lists_of_mask_mlx, threads_for


def select_threshold(scores: mx.array, threshold: float, relative: bool = False) -> RowList:
    """Each token's units with score > threshold.

    Args:
        scores: [N, M], without NaN.
        threshold: in the units of the scores.
        relative: score >= threshold * the token's largest instead, and always the largest itself.

    Returns:
        Ascending lists of length M: [N, M].

    Raises:
        ValueError: not such scores.
        RuntimeError: there is no Apple GPU.

    Source: LTE (Zheng et al. 2024), section 3; relative: D2DMoE (Szatkowski et al. 2024), section 3.
    """
    need_scores(scores)
    need_gpu()
    n, units = scores.shape
    if not n:
        return RowList(mx.zeros((0, units), mx.int32), mx.zeros((0,), mx.int32))
    return RowList(
        *launch(
            "select_threshold",
            {"scores": scores, "threshold": float(threshold)},
            {"indices": ((n, units), mx.int32), "counts": ((n,), mx.int32)},
            (n, 1, 1),
            threads_for(units),
            {"RELATIVE": relative},
            ("places",),
        )
    )


def need_scores(scores: mx.array) -> None:
    """Raises ValueError unless scores are floats [N, M]."""
    need_float("scores", scores)
    if scores.ndim != 2 or not scores.shape[1]:
        raise ValueError(f"scores are {list(scores.shape)}; they must be [N, M] with at least one unit")


def select_threshold_mlx(scores: mx.array, threshold: float, relative: bool = False) -> RowList:
    """`select_threshold` in plain MLX, on any device."""
    need_scores(scores)
    values = scores.astype(mx.float32)
    if not relative:
        return lists_of_mask_mlx(values > threshold)
    largest = values.max(axis=1, keepdims=True) if len(values) else values
    return lists_of_mask_mlx((values >= threshold * largest) | (values == largest))
