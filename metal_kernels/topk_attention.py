"""Spark's attention of one new token of each sequence: the first dimensions choose keys, the others weigh them.

What it must move: of every visible key the first r dimensions, a score in float32 for each head (written and read),
and of the about k survivors the other dimensions and the value. At 8192 keys, dh 256, r 128 and k 256 that is 2.2 MB
for a KV head beside 8.4 MB of dense attention.

Grid: three kernels, as the threshold needs all scores. `topk_scores` goes over chunks, KV heads and sequences as
`selective_attention` does, and leaves scores and of each chunk mean, squared deviations and largest, so that nothing
is read twice and no sum of squares cancels. `topk_chosen`, on the same grid, merges those in order, then asks of 32
scores at a time which keys any head of the group keeps; those alone are read further, several at a time. The largest
score is known by then, so exponentials need no correction, and `topk_merge` only adds. Quantiles come from a table by
the number of visible keys, made once on the host. Offsets are 64-bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from metal_kernels.cache import CHUNK, SIMDGROUPS, KvView, tile_of, visible
from metal_kernels.launch import launch, need_gpu, tiles, up_to_power


@lru_cache(maxsize=8)
def _quantiles(k: int, longest: int) -> mx.array:
    from scipy.special import ndtri

    n = np.arange(longest + 1)
    return mx.array(np.where(n <= k, 0.0, ndtri(1 - k / np.maximum(n, k + 1))).astype(np.float32))


def quantiles(k: int, longest: int) -> mx.array:
    """For each number of visible keys, beyond the longest even: deviations above the mean where k of them are left."""
    # A cache that grows takes another table only where its length doubles.
    return _quantiles(k, up_to_power(longest))


def topk_attention(q: mx.array, cache: KvView, scale: float, r: int, k: int, window: int = 0) -> mx.array:
    """Attention that chooses its keys by the first r dimensions of each head and weighs them by the others.

    With s = scale * <q, key> over the first r dimensions of the n keys that a token sees, keys are kept where
    s > mean + c * (population) standard deviation, c being the standard normal quantile of 1 - k / n, and where s is
    the largest; all of them where n <= k. Over those, softmax(s) * softplus(scale * <q, key> over the other dimensions)
    weighs the values.

    Args:
        q: [B, H, dh], a token of each sequence.
        cache: what they see.
        scale: of both products.
        r: from 1 to dh - 1.
        k: keys that are kept, about; at least 1.
        window: keys seen, counting the token's own; 0 for all.

    Returns:
        [B, H, dh] in q's type; 0 for a sequence of length 0.

    Raises:
        ValueError: shapes, types, r or k that do not fit.
        RuntimeError: there is no Apple GPU.

    Source: Spark Transformer (You et al. 2025), Spark attention.
    """
    _need(q, cache, r, k)
    need_gpu()
    batch, n_heads, dh = q.shape
    if not batch or not cache.longest:
        return mx.zeros(q.shape, q.dtype)
    kv_heads, chunks = cache.keys.shape[2], tiles(cache.longest, CHUNK)
    group, size = n_heads // kv_heads, q.dtype.size
    together = tile_of(dh, group, size)[2]
    across = tiles(group, together)
    seen = {"table": cache.table, "lengths": mx.contiguous(cache.lengths)}
    numbers = {"scale": float(scale), "window": window, "longest": cache.longest}
    constants: dict[str, Any] = {
        "T": q.dtype,
        "R": r,
        "CHUNK": CHUNK,
        "HT": together,
        "TILES": across,
        "QUERIES": group,
        "KV_HEADS": kv_heads,
        **cache.template,
        "SIMDGROUPS": SIMDGROUPS,
    }
    grid, threads = (chunks, kv_heads * across, batch), 32 * SIMDGROUPS
    by_chunk = ((batch, n_heads, chunks), mx.float32)
    values, lanes, _ = tile_of(r, group, size)
    scores, means, squares, largests = launch(
        "topk_scores",
        {"q": q, "keys": cache.keys, **seen, **numbers, "chunks": chunks},
        {"scores": ((batch, n_heads, cache.longest), mx.float32), "means": by_chunk, "squares": by_chunk,
         "largests": by_chunk},
        grid, threads, {**constants, "EL": values, "LK": lanes}, ("kv",), packed=False,
    )  # fmt: skip
    values, lanes, _ = tile_of(dh, group, size)
    parts, sums = launch(
        "topk_chosen",
        {"q": q, "keys": cache.keys, "values": cache.values, **seen, "scores": scores, "means": means,
         "squares": squares, "largests": largests, "quantiles": quantiles(k, cache.longest), **numbers,
         "kept_keys": k},
        {"parts": ((batch, n_heads, chunks, dh), mx.float32), "sums": by_chunk},
        grid, threads, {**constants, "EL": values, "LK": lanes, "DH": dh}, ("kv",), packed=False,
    )  # fmt: skip
    (out,) = launch(
        "topk_merge",
        {"parts": parts, "sums": sums, "lengths": seen["lengths"], "window": window},
        {"out": (q.shape, q.dtype)},
        (tiles(dh, 32), n_heads, batch),
        32,
        {"T": q.dtype, "DH": dh, "CHUNK": CHUNK},
    )
    return out


def _need(q: mx.array, cache: KvView, r: int, k: int) -> None:
    cache.check(q)
    if not 1 <= r < q.shape[2] or k < 1:
        raise ValueError(f"r is {r} and k {k}; r must be from 1 to {q.shape[2] - 1}, and k at least 1")


def topk_attention_mlx(q: mx.array, cache: KvView, scale: float, r: int, k: int, window: int = 0) -> mx.array:
    """`topk_attention` in plain MLX, on any device."""
    _need(q, cache, r, k)
    batch, _, dh = q.shape
    if not batch or not cache.longest:
        return mx.zeros(q.shape, q.dtype)
    keys, values, seen = visible(cache, batch, window)
    queries, mask = q.astype(mx.float32).reshape(batch, keys.shape[2], -1, dh), seen[:, None, None]
    n = seen.sum(axis=1)[:, None, None, None]
    first, other = (
        mx.einsum("bkgd,bnkd->bkgn", queries[..., part], keys[..., part]) * scale
        for part in (slice(None, r), slice(r, None))
    )
    some = mx.maximum(n, 1)
    mean = mx.where(mask, first, 0).sum(axis=3, keepdims=True) / some
    deviation = mx.sqrt(mx.where(mask, mx.square(first - mean), 0).sum(axis=3, keepdims=True) / some)
    largest = mx.where(mask, first, -1e30).max(axis=3, keepdims=True)
    border = mean + quantiles(k, cache.longest)[n] * deviation
    kept = mask & ((first > border) | (first == largest) | (n <= k))
    weights = mx.where(kept, mx.exp(first - largest), 0)
    weights = weights / mx.maximum(weights.sum(axis=3, keepdims=True), 1e-30) * mx.logaddexp(other, 0.0)
    return mx.einsum("bkgn,bnkd->bkgd", weights, values).reshape(q.shape).astype(q.dtype)
