"""Attention of one new token of each sequence, for heads that a list names; the others are exactly 0.

What it must move: keys and values of each KV head with a listed query head, once: 2 * length * dh * 2 bytes of
float16. At Llama-3-8B's shape with 8192 keys that is 32 MB a layer, and half of it for half of the KV heads. Queries,
lists and partial sums ([B, H, chunks, dh] float32, 6 % of it for 4 query heads of a KV head) are little beside them.

Grid: (chunks of CHUNK keys, KV heads, sequences). A simdgroup computes all query heads of its KV head, up to 8, so
that a key is read once whatever the group; larger groups are several threadgroups, which find it in the cache. A lane
reads sixteen bytes of a key: with dh 128 in float16 16 lanes share one, and a simdgroup reads two at a time. Scores of
32 keys are found first, one a lane; so maxima, exponents and what must shrink are computed once for 32 keys. A chunk
is shared by four simdgroups; they merge in pairs, in threadgroup memory (16 KB for 8 heads of 256 dimensions). A
threadgroup none of whose heads is listed ends after reading the list; lists may be in any order, and repeat. Chunks
are of one length whatever the batch, so that a row's arithmetic is its own, and `attention_merge` weighs them in
order. Offsets are 64-bit.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from metal_kernels.cache import CHUNK, SIMDGROUPS, KvView, tile_of, visible
from metal_kernels.launch import launch, need_gpu, tiles
from metal_kernels.lists import RowList, mask_of_lists


def selective_attention(
    q: mx.array,
    cache: KvView,
    heads: RowList | None,
    scale: float,
    unit: str = "head",
    window: int = 0,
    softcap: float = 0.0,
) -> mx.array:
    """softmax(scale * q keys) values of the heads that a list names, and 0 for the others, whose keys are not read.

    Args:
        q: [B, H, dh], a token of each sequence.
        cache: what they see.
        heads: of each sequence, [B, K] and count [B]; in any order. None runs all of them.
        unit: what a list names: "head", or "kv_group" for all query heads of a KV head.
        window: keys seen, counting the token's own; 0 for all.
        softcap: scores are softcap * tanh(score / softcap); 0 for none.

    Returns:
        [B, H, dh] in q's type; 0 for a sequence of length 0.

    Raises:
        ValueError: shapes, types or units that do not fit.
        RuntimeError: there is no Apple GPU.

    Source: selective head attention, Polar Sparsity (Shrestha et al. 2025), algorithm 1.
    """
    _need(q, cache, heads, unit)
    need_gpu()
    batch, n_heads, dh = q.shape
    if not batch or not cache.longest:
        return mx.zeros(q.shape, q.dtype)
    kv_heads, chunks = cache.keys.shape[2], tiles(cache.longest, CHUNK)
    group = n_heads // kv_heads
    values, lanes, together = tile_of(dh, group, q.dtype.size)
    across = tiles(group, together)
    table, lengths = cache.table, mx.contiguous(cache.lengths)
    listed: dict[str, mx.array] = {"heads": lengths[:, None], "counts": lengths}
    if heads is not None:
        listed = {"heads": mx.contiguous(heads.indices), "counts": mx.contiguous(heads.count)}
    constants: dict[str, Any] = {
        "T": q.dtype,
        "DH": dh,
        "CHUNK": CHUNK,
        "LISTED": heads is not None,
        "PER_UNIT": 1 if unit == "head" else group,
    }
    f32 = mx.float32
    parts, largests, sums = launch(
        "selective_attention",
        {"q": q, "keys": cache.keys, "values": cache.values, "table": table, "lengths": lengths, **listed,
         "scale": float(scale), "window": window, "softcap": float(softcap), "chunks": chunks},
        {"parts": ((batch, n_heads, chunks, dh), f32), "largests": ((batch, n_heads, chunks), f32),
         "sums": ((batch, n_heads, chunks), f32)},
        (chunks, kv_heads * across, batch),
        32 * SIMDGROUPS,
        {**constants, "EL": values, "LK": lanes, "HT": together, "TILES": across, "QUERIES": group,
         "KV_HEADS": kv_heads, **cache.template, "CAPPED": softcap > 0, "SIMDGROUPS": SIMDGROUPS},
        ("kv",),
        packed=False,
    )  # fmt: skip
    (out,) = launch(
        "attention_merge",
        {"parts": parts, "largests": largests, "sums": sums, "lengths": lengths, **listed, "window": window},
        {"out": (q.shape, q.dtype)},
        (tiles(dh, 32), n_heads, batch),
        32,
        constants,
        ("kv",),
    )
    return out


def _need(q: mx.array, cache: KvView, heads: RowList | None, unit: str) -> None:
    cache.check(q)
    if unit not in ("head", "kv_group"):
        raise ValueError(f"unit {unit!r} is neither 'head' nor 'kv_group'; take one of them")
    if heads is not None and (len(heads.indices) != len(q) or heads.count.shape != q.shape[:1]):
        raise ValueError(
            f"lists of heads {list(heads.indices.shape)} and counts {list(heads.count.shape)} must be of "
            f"{len(q)} sequences, as q is"
        )


def selective_attention_mlx(
    q: mx.array,
    cache: KvView,
    heads: RowList | None,
    scale: float,
    unit: str = "head",
    window: int = 0,
    softcap: float = 0.0,
) -> mx.array:
    """`selective_attention` in plain MLX, on any device: all heads are computed in float32, then masked."""
    _need(q, cache, heads, unit)
    batch, n_heads, dh = q.shape
    if not batch or not cache.longest:
        return mx.zeros(q.shape, q.dtype)
    keys, values, seen = visible(cache, batch, window)
    kv_heads = keys.shape[2]
    queries = q.astype(mx.float32).reshape(batch, kv_heads, -1, dh)
    scores = mx.einsum("bkgd,bnkd->bkgn", queries, keys) * scale
    scores = softcap * mx.tanh(scores / softcap) if softcap else scores
    mask = seen[:, None, None]
    scores = mx.where(mask, scores, -mx.inf)
    # Where nothing is seen there is no largest; the result is masked below.
    weights = mx.where(mask, mx.exp(scores - mx.max(mx.where(mask, scores, -1e30), axis=3, keepdims=True)), 0)
    weights = weights / mx.maximum(weights.sum(axis=3, keepdims=True), 1e-30)
    out = mx.einsum("bkgn,bnkd->bkgd", weights, values).reshape(q.shape)
    if heads is not None:
        run = mask_of_lists(heads, n_heads if unit == "head" else kv_heads)
        run = run if unit == "head" else mx.repeat(run, n_heads // kv_heads, axis=1)
        out = mx.where(run[:, :, None], out, 0)
    return out.astype(q.dtype)
