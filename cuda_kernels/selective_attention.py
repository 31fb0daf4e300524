"""Attention of one new token of each sequence, for heads that a list names; the others are exactly 0.

What it must move: keys and values of each KV head with a listed query head, once: 2 * length * dh * 2 bytes of float16.
At OPT-66B's shape with 64 sequences of 1920 that is 4.5 GB, and half of it for half of the heads. Queries, lists and
partial sums ([B, H, chunks, dh] float32, 0.4 % of it) are little beside them.

Grid: (chunks of CHUNK keys, KV heads, sequences). A program packs its KV head's query heads into the rows of one tile,
so keys and values are read once whatever the group; a program none of whose heads is listed ends after reading the
list. Lists may thus be in any order, and repeat. Chunks are of one length whatever the batch, so that a sequence alone
fills a GPU as well, and a row's arithmetic is its own; online softmax in float32 inside a chunk, and `merge` weighs the
chunks in order. Keys are loaded turned, with the dimensions of a head consecutive: 16 bytes a thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cuda_kernels.activation import tanh
from cuda_kernels.cache import KvView, piece_of, visible
from cuda_kernels.launch import absent, along_last, empty, need_device, up_to_power
from cuda_kernels.lists import RowList, mask_of_lists
from cuda_kernels.tune import Choice, pick

CHUNK = 256
WARPS = ((4, 3), (4, 4), (2, 3), (8, 3))
"""Warps and stages of a program."""


@triton.jit
def listed(
    heads, list_stride, list_length, counts, sequence, head, HEADS: tl.constexpr, PER_UNIT: tl.constexpr,
    LIST: tl.constexpr,
):  # fmt: skip
    """Which of some query heads a sequence's list names, as int32."""
    if HEADS:
        at = tl.arange(0, LIST)
        count = tl.load(counts + sequence)
        live = (at < count) & (at < list_length)
        units = tl.load(heads + sequence * list_stride + at, mask=live, other=-1)
        found = tl.max(((head // PER_UNIT)[:, None] == units[None, :]).to(tl.int32), 1)
    else:
        found = tl.full(head.shape, 1, tl.int32)
    return found


@triton.jit(do_not_specialize=["list_stride", "list_length", "window"])
def attend_chunk(
    q, keys, values, table, lengths, heads, counts, parts, largests, sums,
    q_batch, q_head, k_page, k_at, k_head, v_page, v_at, v_head, table_stride, list_stride, list_length, scale, window,
    softcap, chunks, n_heads, HEADS: tl.constexpr, PER_UNIT: tl.constexpr, LIST: tl.constexpr, GROUP: tl.constexpr,
    BG: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    kv = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + sequence)
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    start = tl.maximum(chunk * CHUNK, first // BN * BN)
    end = tl.minimum(length, (chunk + 1) * CHUNK)
    row = tl.arange(0, BG)
    head = kv * GROUP + row
    run = listed(heads, list_stride, list_length, counts, sequence, head, HEADS, PER_UNIT, LIST)
    run = tl.where(row < GROUP, run, 0)
    if (start < end) & (tl.max(run, 0) > 0):
        dim = tl.arange(0, BD)
        mine = (row < GROUP)[:, None] & (dim < DH)[None, :]
        query = tl.load(q + sequence * q_batch + head[:, None] * q_head + dim[None, :], mask=mine, other=0.0)
        largest = tl.full([BG], -float("inf"), tl.float32)
        total = tl.zeros([BG], tl.float32)
        acc = tl.zeros([BG, BD], tl.float32)
        for tile in range(start, end, BN):
            at = tile + tl.arange(0, BN)
            seen = (at >= first) & (at < length)
            page, inside = piece_of(table, sequence, tile, table_stride, PAGE, PAGED)
            place = (inside + tl.arange(0, BN)).to(tl.int64)
            k = tl.load(
                keys + page * k_page + kv * k_head + place[None, :] * k_at + dim[:, None],
                mask=seen[None, :] & (dim < DH)[:, None], other=0.0,
            )  # fmt: skip
            score = tl.dot(query, k, input_precision="ieee") * scale
            if SOFTCAP:
                score = softcap * tanh(score / softcap)
            # Exponents of 2: each tile has a key that is seen, so that `largest` is finite from the first one on.
            score = tl.where(seen[None, :], score * 1.4426950408889634, -float("inf"))
            new = tl.maximum(largest, tl.max(score, 1))
            weight = tl.exp2(score - new[:, None])
            shrink = tl.exp2(largest - new)
            v = tl.load(
                values + page * v_page + kv * v_head + place[:, None] * v_at + dim[None, :],
                mask=seen[:, None] & (dim < DH)[None, :], other=0.0,
            )  # fmt: skip
            total = total * shrink + tl.sum(weight, 1)
            acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            largest = new
        slot = (sequence * n_heads + head) * chunks + chunk
        tl.store(parts + slot[:, None] * DH + dim[None, :], acc, mask=mine & (run > 0)[:, None])
        tl.store(largests + slot, largest, mask=run > 0)
        tl.store(sums + slot, total, mask=run > 0)


@triton.jit(do_not_specialize=["list_stride", "list_length", "window"])
def merge(
    parts, largests, sums, lengths, heads, counts, out, list_stride, list_length, window, chunks, n_heads,
    HEADS: tl.constexpr, PER_UNIT: tl.constexpr, LIST: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A head's chunks as one result; zeros where it is not listed, or sees nothing."""
    head = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + sequence)
    one = head + tl.zeros([1], tl.int64)
    run = tl.max(listed(heads, list_stride, list_length, counts, sequence, one, HEADS, PER_UNIT, LIST), 0)
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    dim = tl.arange(0, BD)
    largest = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    acc = tl.zeros([BD], tl.float32)
    if (run > 0) & (length > 0):
        for start in range(first // CHUNK, tl.cdiv(length, CHUNK), BC):
            chunk = start + tl.arange(0, BC)
            live = chunk < tl.cdiv(length, CHUNK)
            slot = (sequence * n_heads + head) * chunks + chunk
            high = tl.load(largests + slot, mask=live, other=-float("inf"))
            new = tl.maximum(largest, tl.max(high, 0))
            weight = tl.exp2(high - new)
            shrink = tl.exp2(largest - new)
            mask = live[:, None] & (dim < DH)[None, :]
            part = tl.load(parts + slot[:, None] * DH + dim[None, :], mask=mask, other=0.0)
            total = total * shrink + tl.sum(weight * tl.load(sums + slot, mask=live, other=0.0), 0)
            acc = acc * shrink + tl.sum(weight[:, None] * part, 0)
            largest = new
        acc = acc / total
    tl.store(out + (sequence * n_heads + head) * DH + dim, acc.to(out.dtype.element_ty), mask=dim < DH)


def selective_attention(
    q: torch.Tensor,
    cache: KvView,
    heads: RowList | None,
    scale: float,
    unit: str = "head",
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
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
        ValueError: shapes, types or units that do not fit, or tensors that are not on a GPU.

    Source: selective head attention, Polar Sparsity (Shrestha et al. 2025), algorithm 1.
    """
    _need(q, cache, heads, unit)
    need_device(q.device)
    q = along_last(q)
    batch, n_heads, dh = q.shape
    kv_heads, chunks = cache.keys.shape[2], max(1, triton.cdiv(cache.longest, CHUNK))
    out = empty(batch, n_heads, dh, dtype=q.dtype, device=q.device)
    if not batch:
        return out
    parts = empty(batch, n_heads, chunks, dh, dtype=torch.float32, device=q.device)
    largests, sums = (empty(batch, n_heads, chunks, dtype=torch.float32, device=q.device) for _ in range(2))
    group, length = n_heads // kv_heads, 0 if heads is None else heads.indices.shape[1]
    index, count = (cache.lengths, cache.lengths) if heads is None else heads
    table = absent(cache.block_table, cache.lengths)
    stride = 0 if heads is None else heads.indices.stride(0)
    lists = {"HEADS": heads is not None, "PER_UNIT": 1 if unit == "head" else group, "LIST": up_to_power(length, 32)}
    shape = {"DH": dh, "BD": up_to_power(dh, 16), "WINDOW": window > 0, "CHUNK": CHUNK}

    def run(tile: Choice) -> None:
        attend_chunk[(chunks, kv_heads, batch)](
            q, cache.keys, cache.values, table, cache.lengths, index, count, parts, largests, sums, *q.stride()[:2],
            *cache.keys.stride()[:3], *cache.values.stride()[:3], table.stride(0), stride, length, scale, window,
            float(softcap), chunks, n_heads, **lists, **shape, GROUP=group, BG=up_to_power(group, 16),
            PAGE=cache.page if cache.block_table is not None else 1, PAGED=cache.block_table is not None,
            SOFTCAP=softcap > 0, BN=cache.tile, **tile,
        )  # fmt: skip

    key = (batch, n_heads, kv_heads, dh, chunks, cache.block_table is not None, length, unit, str(q.dtype))
    run(pick("selective_attention", key, [{"num_warps": w, "num_stages": s} for w, s in WARPS], run))
    merge[(n_heads, batch)](
        parts, largests, sums, cache.lengths, index, count, out, stride, length, window, chunks, n_heads, **lists,
        **shape, BC=up_to_power(chunks, 1, 16),
    )  # fmt: skip
    return out


def _need(q: torch.Tensor, cache: KvView, heads: RowList | None, unit: str) -> None:
    cache.check(q)
    if unit not in ("head", "kv_group"):
        raise ValueError(f"unit {unit!r} is neither 'head' nor 'kv_group'; take one of them")
    if heads is not None and (len(heads.indices) != len(q) or heads.count.shape != q.shape[:1]):
        raise ValueError(
            f"lists of heads {list(heads.indices.shape)} and counts {list(heads.count.shape)} must be of "
            f"{len(q)} sequences, as q is"
        )


def selective_attention_torch(
    q: torch.Tensor,
    cache: KvView,
    heads: RowList | None,
    scale: float,
    unit: str = "head",
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """`selective_attention` in plain torch, on any device: all heads are computed in float32, then masked."""
    _need(q, cache, heads, unit)
    batch, n_heads, _ = q.shape
    keys, values, seen = visible(cache, batch, window)
    group = n_heads // keys.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (keys, values))
    scores = torch.einsum("bhd,bnhd->bhn", q.float(), k) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = torch.where(seen[:, None], scores, -float("inf"))
    weights = torch.where(seen[:, None], torch.softmax(scores, 2), 0)
    out = torch.einsum("bhn,bnhd->bhd", weights, v)
    if heads is not None:
        run = mask_of_lists(heads, n_heads if unit == "head" else n_heads // group)
        run = run if unit == "head" else run.repeat_interleave(group, 1)
        out = torch.where(run[:, :, None], out, 0)
    return out.to(q.dtype)
