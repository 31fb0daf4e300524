"""Attention on MLX arrays: over the keys that a segment sees, in MLX's own kernels where they can do it."""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ondevice.ops.mlx_activation import soft_cap

if TYPE_CHECKING:
    from collections.abc import Callable

    from ondevice.ops.mlx_step import MlxStep, Segment, Visible

    Attend = Callable[[Any, Segment], Any]


def by_segments(q: Any, step: MlxStep, attend: Attend) -> Any:
    """Runs each segment of a step on its queries, and puts the results [N, H * dh] in the order of the tokens.

    Args:
        q: [N, H * dh].
        attend: takes queries [S, n, H * dh] and gives as much.
    """
    results = []
    for segment in step.segments:
        rows = q if segment.rows is None else q[mx.array(segment.rows)]
        out = attend(rows.reshape(*segment.positions.shape, -1), segment)
        results.append(out.reshape(-1, out.shape[-1]))
    joined = results[0] if len(results) == 1 else mx.concatenate(results)
    return joined if step.order is None else joined[step.order]


def full_attention(q: Any, keys: Any, values: Any, seen: Visible, scale: float, softcap: float) -> Any:
    """Softmax attention.

    Args:
        q: [S, n, H * dh].
        keys, values: [S, kv heads, L, dh].
        softcap: 0 for none.

    Returns:
        [S, n, H * dh].
    """
    sequences, n, width = q.shape
    dh = keys.shape[3]
    queries = q.reshape(sequences, n, -1, dh).swapaxes(1, 2)
    if not softcap:
        mask = None if not seen.hides else "causal" if seen.causal else seen.mask
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    else:
        scores = soft_cap(_scores(queries, keys, scale), softcap)
        out = _weigh(mx.softmax(_hide(scores, seen), axis=-1), values)
    return out.swapaxes(1, 2).reshape(sequences, n, width)


def chosen_keys_attention(
    q: Any, keys: Any, values: Any, seen: Visible, scale: float, r: int, k: int
) -> tuple[Any, Any]:
    """Attention that chooses its keys by the first r dimensions of each head; see `SkippingOps.topk_attention`.

    Returns:
        [S, n, H * dh], and which keys were kept, bool [S, kv heads, group, n, L].
    """
    sequences, n, width = q.shape
    queries = q.reshape(sequences, n, -1, keys.shape[3]).swapaxes(1, 2)
    s = _scores(queries[..., :r], keys[..., :r], scale)
    visible = mx.ones((1,) * 5, mx.bool_) if seen.mask is None else seen.mask[:, None]
    number = seen.counts.astype(np.float64)
    quantile = np.vectorize(lambda m: NormalDist().inv_cdf(1 - k / m) if m > k else 0.0, otypes=[float])(number)
    count, c, few = (
        mx.array(x[:, None, None, :, None])
        for x in (number.astype(np.float32), quantile.astype(np.float32), number <= k)
    )
    inside = mx.where(visible, s, 0)
    mean = inside.sum(axis=-1, keepdims=True) / count
    off = mx.where(visible, s - mean, 0)
    border = mean + c * mx.sqrt((off * off).sum(axis=-1, keepdims=True) / count)
    hidden = mx.where(visible, s, -mx.inf)
    largest = hidden.max(axis=-1, keepdims=True)
    kept = visible & ((s > border) | (hidden == largest) | few)
    weights = mx.softmax(mx.where(kept, s, -mx.inf), axis=-1)
    weights = weights * mx.logaddexp(_scores(queries[..., r:], keys[..., r:], scale), mx.array(0.0))
    out = _weigh(weights, values).swapaxes(1, 2).reshape(sequences, n, width)
    return out, kept


def _scores(queries: Any, keys: Any, scale: float) -> Any:
    """float32 [S, kv heads, group, n, L] of queries [S, H, n, d] and keys [S, kv heads, L, d]."""
    sequences, heads, n, d = queries.shape
    grouped = queries.reshape(sequences, keys.shape[1], heads // keys.shape[1], n, d)
    return (grouped @ keys[:, :, None].swapaxes(-1, -2)).astype(mx.float32) * scale


def _hide(scores: Any, seen: Visible) -> Any:
    return scores if seen.mask is None else mx.where(seen.mask[:, None], scores, -mx.inf)


def _weigh(weights: Any, values: Any) -> Any:
    """[S, H, n, dh] of weights [S, kv heads, group, n, L]."""
    out = weights.astype(values.dtype) @ values[:, :, None]
    return out.reshape(out.shape[0], -1, *out.shape[3:])
