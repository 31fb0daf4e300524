"""Kernels of `topk_attention`: the first dimensions choose keys, the others weigh them.

What it must move: of every visible key the first r dimensions, a score in float32 for each head (written and read), and
of the about k survivors the other dimensions and the value. At 8192 keys, dh 256, r 128 and k 256 that is 2.2 MB for a
KV head beside 8.4 MB of dense attention.

Grid: three kernels, as the threshold needs all scores. `topk_scores` (chunks, KV heads, sequences) leaves scores and of
each chunk mean, squared deviations and largest, so that nothing is read twice and no sum of squares cancels.
`topk_chosen`, on the same grid, merges those in order (every program of a head gets the same bits), then reads other
dimensions and values only of keys that a head of its group keeps: loads of the others are masked off, row by row. A
tile without any costs its scores alone. The largest score is known by then, so exponentials need no correction, and
`topk_merge` only adds. Quantiles come from a table by the number of visible keys, made once on the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cuda_kernels.cache import piece_of


@triton.jit
def topk_scores(
    q, keys, table, lengths, scores, means, squares, largests,
    q_batch, q_head, k_page, k_at, k_head, table_stride, scale, window, chunks, longest, n_heads, r,
    GROUP: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr,
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
    if start < end:
        row = tl.arange(0, BG)
        dim = tl.arange(0, BD)
        head = kv * GROUP + row
        mine = (row < GROUP)[:, None] & (dim < r)[None, :]
        query = tl.load(q + sequence * q_batch + head[:, None] * q_head + dim[None, :], mask=mine, other=0.0)
        mean = tl.zeros([BG], tl.float32)
        square = tl.zeros([BG], tl.float32)
        largest = tl.full([BG], -float("inf"), tl.float32)
        before = 0.0
        for tile in range(start, end, BN):
            at = tile + tl.arange(0, BN)
            seen = (at >= first) & (at < length)
            page, inside = piece_of(table, sequence, tile, table_stride, PAGE, PAGED)
            place = (inside + tl.arange(0, BN)).to(tl.int64)
            k = tl.load(
                keys + page * k_page + kv * k_head + place[None, :] * k_at + dim[:, None],
                mask=seen[None, :] & (dim < r)[:, None], other=0.0,
            )  # fmt: skip
            score = tl.dot(query, k, input_precision="ieee") * scale
            where = (sequence * n_heads + head)[:, None] * longest + at[None, :]
            tl.store(scores + where, score, mask=seen[None, :] & (row < GROUP)[:, None])
            # Mean and squared deviations of the tile, merged with those before it.
            now = tl.sum(seen.to(tl.float32), 0)
            own = tl.sum(tl.where(seen[None, :], score, 0.0), 1) / now
            away = tl.where(seen[None, :], score - own[:, None], 0.0)
            apart = own - mean
            square += tl.sum(away * away, 1) + apart * apart * (before * now / (before + now))
            mean += apart * (now / (before + now))
            largest = tl.maximum(largest, tl.max(tl.where(seen[None, :], score, -float("inf")), 1))
            before += now
        slot = (sequence * n_heads + head) * chunks + chunk
        tl.store(means + slot, mean, mask=row < GROUP)
        tl.store(squares + slot, square, mask=row < GROUP)
        tl.store(largests + slot, largest, mask=row < GROUP)


@triton.jit
def topk_chosen(
    q, keys, values, table, lengths, scores, means, squares, largests, quantiles, parts, sums,
    q_batch, q_head, k_page, k_at, k_head, v_page, v_at, v_head, table_stride, scale, window, chunks, longest, n_heads,
    r, k_kept, GROUP: tl.constexpr, BG: tl.constexpr, DH: tl.constexpr, BREST: tl.constexpr, BD: tl.constexpr,
    PAGE: tl.constexpr, PAGED: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr,
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
    if start < end:
        row = tl.arange(0, BG)
        head = kv * GROUP + row
        slots = (sequence * n_heads + head) * chunks
        n = length - first
        mean = tl.zeros([BG], tl.float32)
        square = tl.zeros([BG], tl.float32)
        largest = tl.full([BG], -float("inf"), tl.float32)
        last = tl.cdiv(length, CHUNK)
        for c in range(first // CHUNK, last, BC):
            i = c + tl.arange(0, BC)
            mask = (row < GROUP)[:, None] & (i < last)[None, :]
            has = tl.maximum(tl.minimum(length, (i + 1) * CHUNK) - tl.maximum(first, i * CHUNK), 0).to(tl.float32)
            mean += tl.sum(tl.load(means + slots[:, None] + i[None, :], mask=mask, other=0.0) * has[None, :], 1)
            high = tl.load(largests + slots[:, None] + i[None, :], mask=mask, other=-float("inf"))
            largest = tl.maximum(largest, tl.max(high, 1))
        mean = mean / n
        for c in range(first // CHUNK, last, BC):
            i = c + tl.arange(0, BC)
            mask = (row < GROUP)[:, None] & (i < last)[None, :]
            has = tl.maximum(tl.minimum(length, (i + 1) * CHUNK) - tl.maximum(first, i * CHUNK), 0).to(tl.float32)
            apart = tl.load(means + slots[:, None] + i[None, :], mask=mask, other=0.0) - mean[:, None]
            spread = tl.load(squares + slots[:, None] + i[None, :], mask=mask, other=0.0)
            square += tl.sum(spread + tl.where(mask, apart * apart * has[None, :], 0.0), 1)
        border = mean + tl.load(quantiles + n) * tl.sqrt(square / n)
        dim = tl.arange(0, BD)
        rest = r + tl.arange(0, BREST)
        mine = (row < GROUP)[:, None] & (rest < DH)[None, :]
        query = tl.load(q + sequence * q_batch + head[:, None] * q_head + rest[None, :], mask=mine, other=0.0)
        total = tl.zeros([BG], tl.float32)
        acc = tl.zeros([BG, BD], tl.float32)
        for tile in range(start, end, BN):
            at = tile + tl.arange(0, BN)
            seen = (at >= first) & (at < length)
            mask = seen[None, :] & (row < GROUP)[:, None]
            where = (sequence * n_heads + head)[:, None] * longest + at[None, :]
            score = tl.load(scores + where, mask=mask, other=-float("inf"))
            kept = mask & ((score > border[:, None]) | (score == largest[:, None]) | (n <= k_kept))
            some = tl.max(kept.to(tl.int32), 0) > 0
            if tl.max(some.to(tl.int32), 0) > 0:
                page, inside = piece_of(table, sequence, tile, table_stride, PAGE, PAGED)
                place = (inside + tl.arange(0, BN)).to(tl.int64)
                k = tl.load(
                    keys + page * k_page + kv * k_head + place[None, :] * k_at + rest[:, None],
                    mask=some[None, :] & (rest < DH)[:, None], other=0.0,
                )  # fmt: skip
                v = tl.load(
                    values + page * v_page + kv * v_head + place[:, None] * v_at + dim[None, :],
                    mask=some[:, None] & (dim < DH)[None, :], other=0.0,
                )  # fmt: skip
                other = tl.dot(query, k, input_precision="ieee") * scale
                softplus = tl.maximum(other, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(other)))
                weight = tl.where(kept, tl.exp(score - largest[:, None]), 0.0)
                total += tl.sum(weight, 1)
                acc = tl.dot((weight * softplus).to(v.dtype), v, acc, input_precision="ieee")
        slot = slots + chunk
        out = (row < GROUP)[:, None] & (dim < DH)[None, :]
        tl.store(parts + slot[:, None] * DH + dim[None, :], acc, mask=out)
        tl.store(sums + slot, total, mask=row < GROUP)


@triton.jit
def topk_merge(
    parts, sums, lengths, out, window, chunks, n_heads, DH: tl.constexpr, BD: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + sequence)
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    dim = tl.arange(0, BD)
    total = tl.full((), 0.0, tl.float32)
    acc = tl.zeros([BD], tl.float32)
    last = tl.cdiv(length, CHUNK)
    for start in range(first // CHUNK, last, BC):
        chunk = start + tl.arange(0, BC)
        slot = (sequence * n_heads + head) * chunks + chunk
        mask = (chunk < last)[:, None] & (dim < DH)[None, :]
        acc += tl.sum(tl.load(parts + slot[:, None] * DH + dim[None, :], mask=mask, other=0.0), 0)
        total += tl.sum(tl.load(sums + slot, mask=chunk < last, other=0.0), 0)
    acc = tl.where(length > 0, acc / tl.where(length > 0, total, 1.0), 0.0)
    tl.store(out + (sequence * n_heads + head) * DH + dim, acc.to(out.dtype.element_ty), mask=dim < DH)
