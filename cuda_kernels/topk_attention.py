"""Spark's attention of one new token of each sequence: the first dimensions choose keys, the others weigh them.

`topk_attention_kernels.py` holds the kernels, with what they must move and why their grids are such.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import torch
import triton

from cuda_kernels.cache import KvView, visible
from cuda_kernels.launch import absent, along_last, empty, need_device, up_to_power
from cuda_kernels.topk_attention_kernels import topk_chosen, topk_merge, topk_scores

CHUNK = 256
"""Keys of a program."""


@lru_cache(maxsize=8)
def quantiles(k: int, longest: int, device: torch.device) -> torch.Tensor:
    """For each number of visible keys, up to the longest: deviations above the mean where k of them are left."""
    normal = NormalDist()
    values = [0.0 if n <= k else normal.inv_cdf(1 - k / n) for n in range(longest + 1)]
    return torch.tensor(values, dtype=torch.float32, device=device)


def topk_attention(q: torch.Tensor, cache: KvView, scale: float, r: int, k: int, window: int = 0) -> torch.Tensor:
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
        ValueError: shapes, types, r or k that do not fit, or tensors that are not on a GPU.

    Source: Spark Transformer (You et al. 2025), Spark attention.
    """
    _need(q, cache, r, k)
    need_device(q.device)
    q = along_last(q)
    batch, n_heads, dh = q.shape
    kv_heads, chunks = cache.keys.shape[2], max(1, triton.cdiv(cache.longest, CHUNK))
    out = empty(batch, n_heads, dh, dtype=q.dtype, device=q.device)
    if not batch:
        return out
    table = absent(cache.block_table, cache.lengths)
    group, paged = n_heads // kv_heads, cache.block_table is not None
    f32 = {"dtype": torch.float32, "device": q.device}
    scores = empty(batch, n_heads, cache.longest, **f32)
    means, squares, largests, sums = (empty(batch, n_heads, chunks, **f32) for _ in range(4))
    parts = empty(batch, n_heads, chunks, dh, **f32)
    grid = (chunks, kv_heads, batch)
    sizes = {"WINDOW": window > 0, "CHUNK": CHUNK}
    tile = {
        **sizes,
        "GROUP": group,
        "BG": up_to_power(group, 16),
        "PAGE": cache.page if paged else 1,
        "PAGED": paged,
        "BN": cache.tile,
    }
    topk_scores[grid](
        q, cache.keys, table, cache.lengths, scores, means, squares, largests, *q.stride()[:2],
        *cache.keys.stride()[:3], table.stride(0), scale, window, chunks, cache.longest, n_heads, r,
        **tile, BD=up_to_power(r, 16),
    )  # fmt: skip
    topk_chosen[grid](
        q, cache.keys, cache.values, table, cache.lengths, scores, means, squares, largests,
        quantiles(k, cache.longest, q.device), parts, sums, *q.stride()[:2], *cache.keys.stride()[:3],
        *cache.values.stride()[:3], table.stride(0), scale, window, chunks, cache.longest, n_heads, r, k,
        **tile, DH=dh, BREST=up_to_power(dh - r, 16), BD=up_to_power(dh, 16), BC=up_to_power(chunks, 1, 16),
    )  # fmt: skip
    topk_merge[(n_heads, batch)](
        parts, sums, cache.lengths, out, window, chunks, n_heads, DH=dh, BD=up_to_power(dh, 16), **sizes,
        BC=up_to_power(chunks, 1, 16),
    )  # fmt: skip
    return out


def _need(q: torch.Tensor, cache: KvView, r: int, k: int) -> None:
    cache.check(q)
    if not 1 <= r < q.shape[2] or k < 1:
        raise ValueError(f"r is {r} and k {k}; r must be from 1 to {q.shape[2] - 1}, and k at least 1")


def topk_attention_torch(q: torch.Tensor, cache: KvView, scale: float, r: int, k: int, window: int = 0) -> torch.Tensor:
    """`topk_attention` in plain torch, on any device."""
    _need(q, cache, r, k)
    keys, values, seen = visible(cache, len(q), window)
    group = q.shape[1] // keys.shape[2]
    keys, values, seen = keys.repeat_interleave(group, 2), values.repeat_interleave(group, 2), seen[:, None]
    n = seen.sum(2, keepdim=True)
    both = [torch.einsum("bhd,bnhd->bhn", q[..., part].float(), keys[..., part]) * scale
            for part in (slice(None, r), slice(r, None))]  # fmt: skip
    some = n.clamp(min=1)
    mean = torch.where(seen, both[0], 0).sum(2, keepdim=True) / some
    deviation = (torch.where(seen, both[0] - mean, 0).square().sum(2, keepdim=True) / some).sqrt()
    scores = torch.where(seen, both[0], -float("inf"))
    largest = scores.amax(2, keepdim=True)
    border = mean + quantiles(k, cache.longest, q.device)[n] * deviation
    kept = seen & ((scores > border) | (scores == largest) | (n <= k))
    weights = torch.where(kept, torch.exp(scores - largest), 0)
    weights = weights / weights.sum(2, keepdim=True).clamp(min=1e-30) * torch.nn.functional.softplus(both[1])
    return torch.einsum("bhn,bnhd->bhd", weights, values).to(q.dtype)
