"""Attention of one token over the paged float16 cache, for the query heads that share a KV head.

Keys lie 16 positions to a vector, so scores need no sums across lanes; a page's values stay in the first cache level
while the heads of a group take their turns. The visible positions are cut into fixed chunks, each with its own softmax
maximum, and chunks are merged in order: the same sums whoever computes them, so results depend neither on the number of
threads nor on whether a token was prefilled or decoded.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.compile import Kernel, kernel, named, unpack
from cpu_kernels.rows import tanh
from cpu_kernels.simd import (
    I64,
    add,
    div,
    exp,
    f32_at,
    i32_at,
    keep_lanes,
    largest,
    load_f32,
    maximum,
    mul,
    offset,
    set_f32,
    splat_f32,
    store_f32,
    total,
    zeros,
)

F32 = np.float32
CHUNK = 256
"""Positions with one softmax maximum; a multiple of the page."""
PAGE = 64


def _widest(n: int, limit: int = 4) -> int:
    """The largest divisor of n up to a limit: how many vectors are kept in registers side by side."""
    return max(i for i in range(1, limit + 1) if n % i == 0)


def _registers(b, n):
    made = [cgutils.alloca_once(b, simd.F.llvm) for _ in range(n)]
    for slot in made:
        b.store(simd.floats(0), slot)
    return made


@functools.cache
def _scores(heads):
    """Intrinsic: scores of 16 positions for `heads` queries; keys [d][16], queries and scores one row a head."""

    @intrinsic
    def scores(context, out, out_stride, q, q_stride, keys, head_dim):
        def codegen(ctx, b, signature, args):
            out, out_stride, q, q_stride, keys, head_dim = args
            sums = _registers(b, heads)
            with cgutils.for_range(b, head_dim) as loop:
                at = b.add(keys, b.mul(loop.index, I64(32)))
                simd.prefetch.build(b, offset(b, at, 2048))
                key = simd.load_f16.build(b, at)
                for h in range(heads):
                    where = b.add(b.add(q, b.mul(q_stride, I64(h))), b.mul(loop.index, I64(4)))
                    b.store(simd.fma.build(b, key, simd.splat_f32_at.build(b, where), b.load(sums[h])), sums[h])
            for h in range(heads):
                simd.store_f32.build(b, b.add(out, b.mul(out_stride, I64(h))), b.load(sums[h]))
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return scores


@functools.cache
def _weighted_values(heads, vectors):
    """Intrinsic: adds weighted values of n positions, for `heads` rows of weights, in `vectors` x 16 dimensions."""

    @intrinsic
    def weighted(context, out, out_stride, weights, weight_stride, values, value_stride, n):
        def codegen(ctx, b, signature, args):
            out, out_stride, weights, weight_stride, values, value_stride, n = args
            place = [
                [offset(b, b.add(out, b.mul(out_stride, I64(h))), 64 * i) for i in range(vectors)] for h in range(heads)
            ]
            sums = [_registers(b, vectors) for _ in range(heads)]
            for h in range(heads):
                for i in range(vectors):
                    b.store(simd.load_f32.build(b, place[h][i]), sums[h][i])
            with cgutils.for_range(b, n) as loop:
                at = b.add(values, b.mul(loop.index, value_stride))
                simd.prefetch.build(b, offset(b, at, 2048))
                value = [simd.load_f16.build(b, offset(b, at, 32 * i)) for i in range(vectors)]
                for h in range(heads):
                    where = b.add(b.add(weights, b.mul(weight_stride, I64(h))), b.mul(loop.index, I64(4)))
                    weight = simd.splat_f32_at.build(b, where)
                    for i in range(vectors):
                        b.store(simd.fma.build(b, weight, value[i], b.load(sums[h][i])), sums[h][i])
            for h in range(heads):
                for i in range(vectors):
                    simd.store_f32.build(b, place[h][i], b.load(sums[h][i]))
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return weighted


def scratch_bytes(group: int, padded: int) -> int:
    """Scratch memory per thread: scaled queries, scores, a chunk's result and the running one."""
    return group * (padded * 4 + CHUNK * 4 + 2 * result_bytes(padded))


def result_bytes(padded: int) -> int:
    """A chunk's result for one head: weighted sum [padded], then the maximum and the sum of weights, in float32."""
    return padded * 4 + 64


@functools.cache
def _chunk(group: int, padded: int):
    """Numba function: attention of one token's group of heads over one chunk -> `group` results."""
    slice_heads = _widest(group)
    vectors = _widest(padded // 16)
    scores, weighted = _scores(slice_heads), _weighted_values(slice_heads, vectors)
    result, row = result_bytes(padded), CHUNK * 4

    @numba.njit(error_model="numpy")
    @named(f"{group}x{padded}")
    def soften(at, first, last, start, end, softcap):
        """Caps and masks the scores of one head; the largest."""
        peak = splat_f32(F32(-1e30))
        for p in range(first, last, 16):
            s = load_f32(at + 4 * (p - first))
            if softcap > 0:
                cap = splat_f32(softcap)
                s = mul(cap, tanh(div(s, cap)))
            s = keep_lanes(s, start - p, end - p)
            store_f32(at + 4 * (p - first), s)
            peak = maximum(s, peak)
        return largest(peak)

    @numba.njit(error_model="numpy")
    @named(f"{group}x{padded}")
    def chunk(out, q, work, pages, keys, values, page_bytes, heads, kv_head, start, end, softcap):
        """Positions start..end-1 of one chunk. pages: the slot's row of the block table."""
        first = start // 16 * 16
        last = (end + 15) // 16 * 16
        for p in range(first, last, 16):
            page = i32_at(pages + 4 * (p // PAGE))
            block = keys + (page * heads + kv_head) * page_bytes + p % PAGE * padded * 2
            for h in range(0, group, slice_heads):
                scores(work + h * row + 4 * (p - first), row, q + h * padded * 4, padded * 4, block, padded)
        for h in range(group):
            at = work + h * row
            peak = soften(at, first, last, start, end, softcap)
            shift = splat_f32(-peak)
            weights = zeros()
            for p in range(first, last, 16):
                e = exp(add(load_f32(at + 4 * (p - first)), shift))
                store_f32(at + 4 * (p - first), e)
                weights = add(weights, e)
            o = out + h * result
            for i in range(0, padded, 16):
                store_f32(o + 4 * i, zeros())
            set_f32(o + padded * 4, peak)
            # Masked lanes have weight exp(-87) or less, far below float32's resolution of the sum.
            set_f32(o + padded * 4 + 4, total(weights))
        p = start
        while p < end:
            stop = min(p // PAGE * PAGE + PAGE, end)
            page = i32_at(pages + 4 * (p // PAGE))
            block = values + (page * heads + kv_head) * page_bytes + p % PAGE * padded * 2
            for h in range(0, group, slice_heads):
                at = work + h * row + 4 * (p - first)
                for i in range(0, padded, 16 * vectors):
                    weighted(out + h * result + 4 * i, result, at, row, block + 2 * i, padded * 2, stop - p)
            p = stop

    return chunk


@numba.njit(error_model="numpy")
def _merge(out, part, padded):
    """Takes one more chunk's result of a head into the running one."""
    numbers, more = out + padded * 4, part + padded * 4
    old, new = f32_at(numbers), f32_at(more)
    peak = max(old, new)
    keep, gain = exp(splat_f32(old - peak)), exp(splat_f32(new - peak))
    for i in range(0, padded, 16):
        store_f32(out + 4 * i, add(mul(load_f32(out + 4 * i), keep), mul(load_f32(part + 4 * i), gain)))
    both = add(mul(keep, splat_f32(f32_at(numbers + 4))), mul(gain, splat_f32(f32_at(more + 4))))
    set_f32(numbers, peak)
    set_f32(numbers + 4, largest(both))


@numba.njit(error_model="numpy")
def _store(out, result, padded, head_dim):
    """The weighted sum over the sum of weights."""
    inverse = F32(1) / f32_at(result + padded * 4 + 4)
    for i in range(head_dim):
        set_f32(out + 4 * i, f32_at(result + 4 * i) * inverse)


@numba.njit(error_model="numpy")
def _load_queries(out, q, group, head_dim, padded, scale):
    """A group's queries times the score scale, padded with zeros."""
    for h in range(group):
        for i in range(padded):
            x = f32_at(q + (h * head_dim + i) * 4) * scale if i < head_dim else F32(0)
            set_f32(out + (h * padded + i) * 4, x)


@numba.njit(error_model="numpy")
def _visible(position, window):
    """First position that a token sees."""
    return max(position + 1 - window, 0) if window > 0 else 0


@functools.cache
def attention_tokens(group: int, head_dim: int) -> Kernel:
    """Kernel: tile = token * n_kv_heads + KV head; all its chunks, one after the other. For many tokens."""
    padded = -(-head_dim // 16) * 16
    chunk, result = _chunk(group, padded), result_bytes(padded)

    @kernel(f"attention {group}x{head_dim}, many tokens")
    def attention(arguments, tile, thread):
        (out, out_stride, q, q_stride, positions, slots, block_table, per_slot, keys, values, page_bytes, heads,
         scratch, scratch_each, window, scale, softcap) = unpack(arguments, "iiiiiiiiiiiiiiiff")  # fmt: skip
        token, kv_head = tile // heads, tile % heads
        queries = scratch + thread * scratch_each
        work = queries + group * padded * 4
        part = work + group * CHUNK * 4
        running = part + group * result
        first_head = kv_head * group * head_dim * 4
        _load_queries(queries, q + token * q_stride + first_head, group, head_dim, padded, F32(scale))
        position = i32_at(positions + 4 * token)
        pages = block_table + 4 * i32_at(slots + 4 * token) * per_slot
        start = _visible(position, window)
        fresh = True
        while start <= position:
            end = min(start // CHUNK * CHUNK + CHUNK, position + 1)
            target = running if fresh else part
            chunk(
                target,
                queries,
                work,
                pages,
                keys,
                values,
                page_bytes,
                heads,
                kv_head,
                start,
                end,
                F32(softcap),
            )
            if not fresh:
                for h in range(group):
                    _merge(running + h * result, part + h * result, padded)
            fresh = False
            start = end
        for h in range(group):
            o = out + token * out_stride + first_head + h * head_dim * 4
            _store(o, running + h * result, padded, head_dim)

    return attention


@functools.cache
def attention_chunks(group: int, head_dim: int) -> Kernel:
    """Kernel: tile = (token * n_kv_heads + KV head) * chunks + chunk; leaves results to `attention_merge`.

    For few tokens, whose positions must be shared among threads.
    """
    padded = -(-head_dim // 16) * 16
    chunk, result = _chunk(group, padded), result_bytes(padded)

    @kernel(f"attention {group}x{head_dim}, few tokens")
    def attention(arguments, tile, thread):
        (parts, most_chunks, chunks_at, q, q_stride, positions, slots, block_table, per_slot, keys, values, page_bytes,
         heads, scratch, scratch_each, window, scale, softcap) = unpack(arguments, "iiiiiiiiiiiiiiiiff")  # fmt: skip
        chunks = i32_at(chunks_at)
        token, kv_head, index = tile // chunks // heads, tile // chunks % heads, tile % chunks
        position = i32_at(positions + 4 * token)
        start = max(_visible(position, window), index * CHUNK)
        end = min(index * CHUNK + CHUNK, position + 1)
        if start >= end:
            return
        queries = scratch + thread * scratch_each
        work = queries + group * padded * 4
        first_head = kv_head * group * head_dim * 4
        _load_queries(queries, q + token * q_stride + first_head, group, head_dim, padded, F32(scale))
        pages = block_table + 4 * i32_at(slots + 4 * token) * per_slot
        out = parts + ((token * heads + kv_head) * most_chunks + index) * group * result
        chunk(out, queries, work, pages, keys, values, page_bytes, heads, kv_head, start, end, F32(softcap))

    return attention


@functools.cache
def attention_merge(group: int, head_dim: int) -> Kernel:
    """Kernel: tile = token * n_kv_heads + KV head; joins its chunks in order."""
    padded = -(-head_dim // 16) * 16
    result = result_bytes(padded)

    @kernel(f"attention {group}x{head_dim}, merge")
    def merge(arguments, tile, thread):
        out, out_stride, parts, most_chunks, positions, heads, window = unpack(arguments, "iiiiiii")
        token, kv_head = tile // heads, tile % heads
        position = i32_at(positions + 4 * token)
        first, last = _visible(position, window) // CHUNK, position // CHUNK
        base = parts + tile * most_chunks * group * result
        for h in range(group):
            running = base + first * group * result + h * result
            for index in range(first + 1, last + 1):
                _merge(running, base + index * group * result + h * result, padded)
            o = out + token * out_stride + (kv_head * group + h) * head_dim * 4
            _store(o, running, padded, head_dim)

    return merge
