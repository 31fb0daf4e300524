"""Selections on MLX arrays: masks that stay on the device, so that no step waits for the host to learn what is in them.

How many units a selection keeps is known to the host where its selector says so, and counted on the device elsewhere.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ondevice.sparsity.selection import HeadSelection, Selection


def select_topk(scores: Any, k: int, shared: bool) -> Selection:
    """The k largest; of equal ones the first."""
    if shared:
        scores = mx.maximum(scores.astype(mx.float32), 0).sum(axis=0, keepdims=True)
    return Selection(largest(scores, k), scores.shape[1], shared)


def largest(scores: Any, k: int) -> Any:
    """bool [N, M] of each row's k largest; of equal ones the first, whatever order a sort would leave them in."""
    if k >= scores.shape[1]:
        return mx.ones(scores.shape, mx.bool_)
    border = mx.sort(scores, axis=1)[:, scores.shape[1] - k, None]
    above, equal = scores > border, scores == border
    room = k - above.sum(axis=1, keepdims=True)
    return above | (equal & (mx.cumsum(equal.astype(mx.int32), axis=1) <= room))


def select_threshold(scores: Any, threshold: float, relative: bool) -> Selection:
    """Scores above a border, or near the row's largest."""
    if not relative:
        return Selection(scores > threshold, scores.shape[1], False)
    most = scores.max(axis=1, keepdims=True)
    return Selection((scores >= threshold * most) | (scores == most), scores.shape[1], False)


def select_magnitude(x: Any, threshold: float, factors: Any) -> Selection:
    """Large entries."""
    sizes = mx.abs(x) if factors is None else mx.abs(x) * factors
    return Selection(sizes > threshold, x.shape[1], False)


def statistical_topk(scores: Any, c: float) -> tuple[Any, Selection]:
    """What exceeds mean + c * deviation, and where."""
    exact = scores.astype(mx.float32)
    mean = exact.mean(axis=1, keepdims=True)
    border = mean + c * mx.sqrt(mx.square(exact - mean).mean(axis=1, keepdims=True))
    values = mx.maximum(exact - border, 0).astype(scores.dtype)
    return values, Selection(exact > border, scores.shape[1], False)


def random_mask(shape: tuple[int, int], density: float, behind: Any = None) -> Any:
    """bool [rows, units], each row with its part of random units, drawn anew at each call.

    Args:
        behind: of the same shape, computed before: MLX leaves out what nobody uses.
    """
    noise = mx.random.uniform(shape=shape)
    if behind is not None:
        noise = noise + 0 * behind.astype(mx.float32)
    return mx.argsort(noise, axis=1) < round(density * shape[1])


def select_heads(scores: Any, k: int, group: int) -> HeadSelection:
    """The k heads, or groups of heads, of the largest scores."""
    units = scores.reshape(len(scores), -1, group).max(axis=2)
    return HeadSelection(largest(units, k), k, group)


def only_heads(out: Any, heads: HeadSelection) -> Any:
    """Attention's result [N, H * dh] with heads that were not selected set to 0."""
    tokens, units = heads.index.shape
    parts = out.reshape(tokens, units, -1)
    return mx.where(heads.index[:, :, None], parts, 0).reshape(out.shape)
