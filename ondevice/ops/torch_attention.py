"""Attention on torch tensors: over the keys that a segment sees, differentiable."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import torch
from torch.nn import functional

from ondevice.ops.torch_step import Segment, TorchStep, Visible

Attend = Callable[[torch.Tensor, Segment], torch.Tensor]


def by_segments(q: torch.Tensor, step: TorchStep, attend: Attend) -> torch.Tensor:
    """Runs each segment of a step on its queries, and puts the results [N, H * dh] in the order of the tokens.

    Args:
        q: [N, H * dh].
        attend: takes queries [S, n, H * dh] and gives as much.
    """
    results = []
    for segment in step.segments:
        rows = q if segment.rows is None else q[torch.from_numpy(segment.rows).to(q.device)]
        results.append(attend(rows.unflatten(0, segment.positions.shape), segment).flatten(0, 1))
    joined = results[0] if len(results) == 1 else torch.cat(results)
    return joined if step.order is None else joined[step.order]


def full_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: Visible, scale: float, softcap: float
) -> torch.Tensor:
    """Softmax attention.

    Args:
        q: [S, n, H * dh].
        keys, values: [S, L, kv heads, dh].
        softcap: 0 for none.

    Returns:
        [S, n, H * dh].
    """
    dh = keys.shape[3]
    if softcap:
        scores = softcap * torch.tanh(_scores(q, keys, scale, slice(None)) / softcap)
        hidden = scores.masked_fill(~seen.mask[:, None, None], -float("inf"))
        return _weigh(torch.softmax(hidden, -1), values)
    queries, k, v = q.unflatten(2, (-1, dh)).transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    out = functional.scaled_dot_product_attention(
        queries, k, v, attn_mask=seen.mask[:, None], scale=scale, enable_gqa=queries.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(2)


def chosen_keys_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: Visible, scale: float, r: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that chooses its keys by the first r dimensions of each head; see `SkippingOps.topk_attention`.

    Returns:
        [S, n, H * dh], and which keys were kept, bool [S, kv heads, group, n, L].
    """
    s = _scores(q, keys, scale, slice(None, r))
    visible, number = seen.mask[:, None, None], seen.counts.astype(np.float64)
    quantile = np.vectorize(lambda m: NormalDist().inv_cdf(1 - k / m) if m > k else 0.0, otypes=[float])(number)
    count, c, few = (
        torch.from_numpy(x[:, None, None, :, None]).to(s.device, s.dtype if x.dtype == float else torch.bool)
        for x in (number, quantile, number <= k)
    )
    mean = s.masked_fill(~visible, 0).sum(-1, keepdim=True) / count
    away = (s - mean).masked_fill(~visible, 0)
    border = mean + c * (away.square().sum(-1, keepdim=True) / count).sqrt()
    hidden = s.masked_fill(~visible, -float("inf"))
    kept = visible & ((s > border) | (hidden == hidden.amax(-1, keepdim=True)) | few)
    weights = torch.softmax(s.masked_fill(~kept, -float("inf")), -1)
    return _weigh(weights * functional.softplus(_scores(q, keys, scale, slice(r, None))), values), kept


def _scores(q: torch.Tensor, keys: torch.Tensor, scale: float, part: slice) -> torch.Tensor:
    """[S, kv heads, group, n, L], in float32 at least, of a part of each head's dimensions."""
    queries = q.unflatten(2, (keys.shape[2], -1, keys.shape[3]))
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.einsum("snkgd,slkd->skgnl", queries[..., part], keys[..., part]).to(wide) * scale


def _weigh(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[S, n, H * dh] of weights [S, kv heads, group, n, L]."""
    return torch.einsum("skgnl,slkd->snkgd", weights.to(values.dtype), values).flatten(2)
