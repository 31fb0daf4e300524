"""Causal attention of each query head to about k keys, chosen by a part of their dimensions.

A query head q and its keys are cut after `first_dims` dimensions. The first parts give a score for every visible key,
s = scale * <q1, k1>, capped to softcap * tanh(s / softcap) if softcap > 0; what is above the threshold of `topk_scores`
survives (the largest if nothing is, all if no more than k are visible). Only survivors' other dimensions and values are
read: out = sum of softmax(s) * softplus(rest_scale * <q2, k2>) * v, the softmax over the survivors, and neither cap nor
`scale` in the second product. Queries and keys come rotated. A token at position -1 sees nothing and gets zeros.
Source: Spark Transformer (arXiv 2506.06644), Spark Attention.
"""

from __future__ import annotations

import functools

import numba
import numpy as np

from cpu_kernels.atomics import atomic_add, atomic_store
from cpu_kernels.attention import consecutive
from cpu_kernels.attention_chunk import CHUNK, SCORE_STRIDE, block_tokens, padded_dim, query_stride, visible
from cpu_kernels.compile import Kernel, kernel, unpack
from cpu_kernels.selected_heads import clear
from cpu_kernels.simd import (
    f32_at,
    i32_at,
    load_f32,
    mul,
    set_f32,
    splat_f32,
    store_f32,
    zeros,
)
from cpu_kernels.softmax import LOG2_E, finish, result_bytes
from cpu_kernels.topk_scores import DESCRIPTION, LIMITS, limits, score_chunk
from cpu_kernels.topk_values import SPAN, WORK, join, span_values

F32 = np.float32
LINE = 64


def score_bytes(group: int) -> int:
    """Memory for the scores of one chunk of a token's group of heads."""
    return group * SCORE_STRIDE


def description_bytes(group: int) -> int:
    """Memory for the descriptions of one chunk of a token's group of heads."""
    return group * DESCRIPTION


def part_bytes(group: int, head_dim: int) -> int:
    """Memory for a span's results of a token's group of heads."""
    return group * result_bytes(padded_dim(head_dim))


def limit_bytes(group: int) -> int:
    """Memory for the limits of a token's group of heads."""
    return -(-group * LIMITS // LINE) * LINE


def scratch_bytes(group: int, head_dim: int, first_dims: int, chunks: int) -> int:
    """Scratch memory per thread of `topk_tokens`, of which the two other kernels need less.

    Args:
        chunks: that a token may see.
    """
    queries = query_stride(first_dims) + query_stride(head_dim - first_dims)
    blocks = block_tokens(group) * (group * queries + chunks * (score_bytes(group) + description_bytes(group)))
    return blocks + limit_bytes(group) + 2 * part_bytes(group, head_dim) + WORK + 2 * LINE


@numba.njit(error_model="numpy")
def _load(out, out_stride, q, q_step, n, heads, factor):
    """The first n dimensions of a token's heads, times a factor, and zeros up to a whole vector."""
    whole, scale = n // 16 * 16, splat_f32(factor)
    for h in range(heads):
        row, source = out + h * out_stride, q + h * q_step
        if whole < n:
            store_f32(row + 4 * whole, zeros())
        for i in range(0, whole, 16):
            store_f32(row + 4 * i, mul(load_f32(source + 4 * i), scale))
        for i in range(whole, n):
            set_f32(row + 4 * i, f32_at(source + 4 * i) * factor)


@numba.njit(error_model="numpy")
def _score_factor(scale, softcap):
    return F32(scale / softcap) if softcap > 0 else F32(scale) * LOG2_E


@functools.cache
def topk_scores(group: int, head_dim: int, first_dims: int) -> Kernel:
    """For few tokens, whose chunks threads share: all scores and limits.

    Tile = (token * n_kv_heads + KV head) * tiles + part. A token's chunks are dealt evenly to the parts; whoever is the
    last to finish one sets the limits. counters: a cache line for each token and head, zeros before and after.
    """
    score, stride = score_chunk(group, first_dims), query_stride(first_dims)
    scores_each, described_each, limits_each = score_bytes(group), description_bytes(group), limit_bytes(group)
    row_bytes = padded_dim(first_dims) * 128

    @kernel(f"top-k attention {group}x{head_dim} by {first_dims}, scores")
    def scores(arguments, tile, thread):
        (scores, described, limit, most_chunks, tiles_at, counters, q, q_stride, positions, slots, block_table,
         per_slot, firsts, heads, scratch, scratch_each, k, table, window, scale, softcap) = unpack(
            arguments, "iiiiiiiiiiiiiiiiiiiff")  # fmt: skip
        tiles = i32_at(tiles_at)
        which, index = tile // tiles, tile % tiles
        token, kv_head = which // heads, which % heads
        position = i32_at(positions + 4 * token)
        oldest, newest = visible(position, window) // CHUNK, position // CHUNK
        chunks = newest + 1 - oldest
        each = (chunks + tiles - 1) // tiles
        start = oldest + index * each
        if position < 0 or start > newest:
            return
        queries = scratch + thread * scratch_each
        source = q + token * q_stride + kv_head * group * head_dim * 4
        _load(queries, stride, source, head_dim * 4, first_dims, group, _score_factor(scale, softcap))
        pages, keys = block_table + 4 * i32_at(slots + 4 * token) * per_slot, firsts + kv_head * row_bytes
        base, about = scores + which * most_chunks * scores_each, described + which * most_chunks * described_each
        for i in range(start, min(start + each, newest + 1)):
            score(base + i * scores_each, about + i * described_each, queries, keys, pages, heads * row_bytes,
                  position, 1, i, newest, window, F32(softcap))  # fmt: skip
        if each < chunks:
            if atomic_add(counters + LINE * which, 1) < (chunks + each - 1) // each - 1:
                return
            atomic_store(counters + LINE * which, 0)
        for h in range(group):
            limits(limit + which * limits_each + h * LIMITS, about + h * DESCRIPTION, described_each, position, window,
                   k, table)  # fmt: skip

    return scores


@functools.cache
def topk_values(group: int, head_dim: int, first_dims: int) -> Kernel:
    """After `topk_scores`: the survivors' values. Tiles as there, of which each has some of a token's spans."""
    values_of, stride = span_values(group, head_dim, first_dims), query_stride(head_dim - first_dims)
    scores_each, limits_each, part_each = score_bytes(group), limit_bytes(group), part_bytes(group, head_dim)
    padded, result = padded_dim(head_dim), result_bytes(padded_dim(head_dim))

    @kernel(f"top-k attention {group}x{head_dim} by {first_dims}, values")
    def values(arguments, tile, thread):
        (out, out_stride, scores, limit, parts, most_chunks, tiles_at, counters, q, q_stride, positions, slots,
         block_table, per_slot, rests, values, heads, scratch, scratch_each, window, rest_scale) = unpack(
            arguments, "iiiiiiiiiiiiiiiiiiiif")  # fmt: skip
        tiles = i32_at(tiles_at)
        which, index = tile // tiles, tile % tiles
        token, kv_head = which // heads, which % heads
        position, head = i32_at(positions + 4 * token), kv_head * group * head_dim * 4
        o, x = out + token * out_stride + head, q + token * q_stride + head + 4 * first_dims
        if position < 0:
            if index == 0:
                clear(o, group * head_dim)
            return
        oldest, newest = visible(position, window) // SPAN, position // SPAN
        spans = newest + 1 - oldest
        each = (spans + tiles - 1) // tiles
        start = oldest + index * each
        if start > newest:
            return
        queries = scratch + thread * scratch_each
        _load(queries, stride, x, head_dim * 4, head_dim - first_dims, group, F32(rest_scale))
        pages = block_table + 4 * i32_at(slots + 4 * token) * per_slot
        base = parts + which * ((most_chunks * CHUNK + SPAN - 1) // SPAN) * part_each
        for i in range(start, min(start + each, newest + 1)):
            values_of(base + i * part_each, limit + which * limits_each, scores + which * most_chunks * scores_each,
                      scores_each, queries, queries + group * stride, rests, values, pages, heads, kv_head, position,
                      i, window)  # fmt: skip
        if each < spans:
            if atomic_add(counters + LINE * which, 1) < (spans + each - 1) // each - 1:
                return
            atomic_store(counters + LINE * which, 0)
        for h in range(group):
            running = base + oldest * part_each + h * result
            for i in range(oldest + 1, newest + 1):
                join(running, base + i * part_each + h * result, padded)
            finish(o + h * head_dim * 4, running, padded, head_dim)

    return values


@functools.cache
def _block(group: int, head_dim: int, first_dims: int):
    """Numba function: top-k attention of a token, or of a block's consecutive tokens, one chunk after the other."""
    score, values_of = score_chunk(group, first_dims), span_values(group, head_dim, first_dims)
    first_stride, rest_stride = query_stride(first_dims), query_stride(head_dim - first_dims)
    padded, result, part_each = padded_dim(head_dim), result_bytes(padded_dim(head_dim)), part_bytes(group, head_dim)
    limits_each, row_bytes = limit_bytes(group), padded_dim(first_dims) * 128

    @numba.njit(error_model="numpy")
    def every(out, out_stride, q, q_stride, scratch, firsts, rests, values, pages, heads, kv_head, position, tokens,
              k, table, window, scale, softcap, rest_scale):  # fmt: skip
        rows = tokens * group
        oldest, newest = visible(position, window) // CHUNK, (position + tokens - 1) // CHUNK
        limit, running = scratch, scratch + limits_each
        part = running + part_each
        work = part + part_each
        queries = work + WORK
        rest = queries + rows * first_stride
        described = rest + group * rest_stride
        scores = described + ((newest + 1 - oldest) * rows * DESCRIPTION + LINE - 1) // LINE * LINE
        for t in range(tokens):
            _load(queries + t * group * first_stride, first_stride, q + t * q_stride, head_dim * 4, first_dims, group,
                  _score_factor(scale, softcap))  # fmt: skip
        # As if chunk 0's were the first.
        scores, described = scores - oldest * rows * SCORE_STRIDE, described - oldest * rows * DESCRIPTION
        keys = firsts + kv_head * row_bytes
        for i in range(oldest, newest + 1):
            score(scores + i * rows * SCORE_STRIDE, described + i * rows * DESCRIPTION, queries, keys, pages,
                  heads * row_bytes, position, tokens, i, newest, window, softcap)  # fmt: skip
        for t in range(tokens):
            seen = position + t
            _load(rest, rest_stride, q + t * q_stride + 4 * first_dims, head_dim * 4, head_dim - first_dims, group,
                  rest_scale)  # fmt: skip
            for h in range(group):
                limits(limit + h * LIMITS, described + (t * group + h) * DESCRIPTION, rows * DESCRIPTION, seen, window,
                       k, table)  # fmt: skip
            first = visible(seen, window) // SPAN
            for span in range(first, seen // SPAN + 1):
                sums = running if span == first else part
                values_of(sums, limit, scores + t * group * SCORE_STRIDE, rows * SCORE_STRIDE, rest, work, rests,
                          values, pages, heads, kv_head, seen, span, window)  # fmt: skip
                if span > first:
                    for h in range(group):
                        join(running + h * result, part + h * result, padded)
            for h in range(group):
                finish(out + t * out_stride + h * head_dim * 4, running + h * result, padded, head_dim)

    return every


@functools.cache
def topk_tokens(group: int, head_dim: int, first_dims: int) -> Kernel:
    """For many tokens: tile = block of `each` tokens * n_kv_heads + KV head, the last block first."""
    block, every = block_tokens(group), _block(group, head_dim, first_dims)

    @kernel(f"top-k attention {group}x{head_dim} by {first_dims}, many tokens")
    def tokens(arguments, tile, thread):
        (out, out_stride, n, each, q, q_stride, positions, slots, block_table, per_slot, firsts, rests, values, heads,
         scratch, scratch_each, k, table, window, scale, softcap, rest_scale) = unpack(
            arguments, "iiiiiiiiiiiiiiiiiiifff")  # fmt: skip
        kv_head, memory = tile % heads, scratch + thread * scratch_each
        token = ((n + each - 1) // each - 1 - tile // heads) * each
        end, head = min(token + each, n), kv_head * group * head_dim * 4
        while token < end:
            some = block if token + block <= end and consecutive(positions, slots, token, block) else 1
            pages, position = block_table + 4 * i32_at(slots + 4 * token) * per_slot, i32_at(positions + 4 * token)
            o, x = out + token * out_stride + head, q + token * q_stride + head
            if position < 0:
                clear(o, group * head_dim)
            else:
                every(o, out_stride, x, q_stride, memory, firsts, rests, values, pages, heads, kv_head, position, some,
                      k, table, window, F32(scale), F32(softcap), F32(rest_scale))  # fmt: skip
            token += some

    return tokens
