"""About k units of each row, by a normal distribution's quantile: no sort, three passes.

What it must move: a row of scores three times (mean, deviation, result), of which the cache serves two, and 4 bytes
for each score of the result and for each listed unit. Grid: a threadgroup for each row, as the list is written in
order; 13,824 scores are 55 KB. A thread adds every 1024th score, and simdgroups add those; the deviation is taken from
the known mean. So neither loses what a sum of squares would.
"""

from __future__ import annotations

import mlx.core as mx

from metal_kernels.launch import launch, need_gpu
from metal_kernels.lists import RowList, lists_of_mask_mlx, threads_for
from metal_kernels.select_threshold import need_scores


def statistical_topk(scores: mx.array, c: float) -> tuple[mx.array, RowList]:
    """max(score - border, 0), with border = mean + c * (population) standard deviation of the token's scores.

    Args:
        scores: [N, M].
        c: the standard normal quantile of the part that is left out.

    Returns:
        Values [N, M] in float32, and ascending lists of the units above the border, of length M.

    Raises:
        ValueError: not such scores.
        RuntimeError: there is no Apple GPU.

    Source: Spark Transformer (You et al. 2025), statistical top-k.
    """
    need_scores(scores)
    need_gpu()
    n, units = scores.shape
    if not n:
        return mx.zeros((0, units)), RowList(mx.zeros((0, units), mx.int32), mx.zeros((0,), mx.int32))
    values, indices, counts = launch(
        "statistical_topk",
        {"scores": scores, "c": float(c)},
        {"values": ((n, units), mx.float32), "indices": ((n, units), mx.int32), "counts": ((n,), mx.int32)},
        (n, 1, 1),
        threads_for(units),
        {},
        ("places", "sums"),
    )
    return values, RowList(indices, counts)


def statistical_topk_mlx(scores: mx.array, c: float) -> tuple[mx.array, RowList]:
    """`statistical_topk` in plain MLX, on any device."""
    need_scores(scores)
    values = scores.astype(mx.float32)
    mean = values.mean(axis=1, keepdims=True)
    border = mean + c * mx.sqrt(mx.square(values - mean).mean(axis=1, keepdims=True))
    return mx.maximum(values - border, 0), lists_of_mask_mlx(values > border)
