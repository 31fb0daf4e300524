"""Causal attention over the paged float16 cache, for prompts and for single tokens, of all heads or of selected ones.

A KV head that no token of a tile asked for is neither read nor computed, whoever does not ask gets zeros, and what is
computed does not depend on the selection. A token at position -1 sees nothing and gets zeros too.
"""

from __future__ import annotations

import functools

import numba
import numpy as np

from cpu_kernels.atomics import atomic_add, atomic_store
from cpu_kernels.attention_chunk import (
    CHUNK,
    SCORE_STRIDE,
    block_tokens,
    chunk,
    load_queries,
    padded_dim,
    query_stride,
    visible,
)
from cpu_kernels.compile import Kernel, kernel, named, unpack
from cpu_kernels.selected_heads import any_chosen, chosen, clear
from cpu_kernels.simd import i32_at, load_f32, store_f32
from cpu_kernels.softmax import finish, merge, result_bytes

F32 = np.float32


def scratch_bytes(group: int, head_dim: int) -> int:
    """Scratch memory per thread: queries, scores, a chunk's results and the running ones, of a block's rows."""
    each = query_stride(head_dim) + SCORE_STRIDE + 2 * result_bytes(padded_dim(head_dim))
    return block_tokens(group) * group * each


def part_bytes(group: int, head_dim: int) -> int:
    """Memory for one chunk's results of a token's group of heads."""
    return group * result_bytes(padded_dim(head_dim))


def tile_positions(longest: int) -> int:
    """Positions for one tile of `attention_chunks`, given the most that a token sees.

    One chunk where there are few, for many threads to share; longer runs at depth, since a tile starts with a wait for
    its first keys.
    """
    return CHUNK * min(8, max(1, longest // (16 * CHUNK)))


def tokens_each(group: int, positions: np.ndarray, slots: np.ndarray) -> int:
    """Tokens of one tile of `attention_tokens`: blocks where a step's tokens look like prompts, else one.

    It is a matter of speed alone: steps of the same size may have any other slots and positions.
    """
    follow = (np.diff(positions) == 1) & (np.diff(slots) == 0)
    return block_tokens(group) if follow.mean() > 0.5 else 1


@numba.njit(error_model="numpy")
def _copy(out, x, nbytes):
    for i in range(0, nbytes, 64):
        store_f32(out + i, load_f32(x + i))


@functools.cache
def _all_chunks(group: int, head_dim: int):
    """Numba function: attention of a token, or of a block's consecutive tokens, one chunk after the other."""
    padded = padded_dim(head_dim)
    result, queries_each = result_bytes(padded), group * query_stride(head_dim)
    attend, load = chunk(group, head_dim), load_queries(group, head_dim)

    @numba.njit(error_model="numpy")
    @named(f"{group}x{head_dim}")
    def every(out, out_stride, q, q_stride, scratch, keys, values, pages, page_step, position, tokens, rotation, half,
              window, scale, softcap):  # fmt: skip
        rows = group * tokens
        queries, running = scratch, scratch + tokens * queries_each
        part = running + rows * result
        work = part + rows * result
        for t in range(tokens):
            load(queries + t * queries_each, q + t * q_stride, position + t, rotation, half, scale, softcap)
        oldest, newest = visible(position, window) // CHUNK, (position + tokens - 1) // CHUNK
        attend(running, queries, work, keys, values, pages, page_step, position, tokens, oldest, window, softcap)
        for index in range(oldest + 1, newest + 1):
            attend(part, queries, work, keys, values, pages, page_step, position, tokens, index, window, softcap)
            for row in range(rows):
                seen = position + row // group
                first = visible(seen, window) // CHUNK
                if first < index <= seen // CHUNK:
                    merge(running + row * result, part + row * result, padded)
                elif first == index:
                    _copy(running + row * result, part + row * result, result)
        for row in range(rows):
            o = out + row // group * out_stride + row % group * head_dim * 4
            finish(o, running + row * result, padded, head_dim)

    return every


@numba.njit(error_model="numpy")
def consecutive(positions, slots, first, n):
    """Whether n tokens follow each other in one slot, all seeing something."""
    position, slot = i32_at(positions + 4 * first), i32_at(slots + 4 * first)
    if position < 0:
        return False
    for i in range(1, n):
        if i32_at(positions + 4 * (first + i)) != position + i or i32_at(slots + 4 * (first + i)) != slot:
            return False
    return True


@functools.cache
def attention_tokens(group: int, head_dim: int) -> Kernel:
    """Kernel for many tokens: tile = block of `each` tokens * n_kv_heads + KV head, the last block first.

    Late tokens of a prompt see the most: whoever takes theirs last would keep everybody waiting.
    """
    block = block_tokens(group)
    every = _all_chunks(group, head_dim)

    @kernel(f"attention {group}x{head_dim}, many tokens")
    def attention(arguments, tile, thread):
        (out, out_stride, n, each, q, q_stride, positions, slots, block_table, per_slot, keys, values, page_bytes,
         heads, scratch, scratch_each, rotation, half, window, scale, softcap, masks, mask_stride, unit) = unpack(
            arguments, "iiiiiiiiiiiiiiiiiiiffiii")  # fmt: skip
        kv_head, memory = tile % heads, scratch + thread * scratch_each
        token = ((n + each - 1) // each - 1 - tile // heads) * each
        end = min(token + each, n)
        head = kv_head * group
        first_head = head * head_dim * 4
        k, v = keys + kv_head * page_bytes, values + kv_head * page_bytes
        while token < end:
            some = block if token + block <= end and consecutive(positions, slots, token, block) else 1
            pages = block_table + 4 * i32_at(slots + 4 * token) * per_slot
            o, x, position = out + token * out_stride, q + token * q_stride, i32_at(positions + 4 * token)
            if position >= 0 and any_chosen(masks, mask_stride, unit, token, some, head, group):
                every(o + first_head, out_stride, x + first_head, q_stride, memory, k, v, pages, heads * page_bytes,
                      position, some, rotation, half, window, F32(scale), F32(softcap))  # fmt: skip
            for t in range(some):
                for h in range(group):
                    if position < 0 or not chosen(masks, mask_stride, unit, token + t, head + h):
                        clear(o + t * out_stride + first_head + h * head_dim * 4, head_dim)
            token += some

    return attention


@functools.cache
def attention_chunks(group: int, head_dim: int) -> Kernel:
    """For few tokens, whose chunks threads share: tile = (token * n_kv_heads + KV head) * tiles + part.

    A token's chunks are dealt evenly to the parts. Whoever is the last to finish one joins all chunks, in order.
    counters: a cache line for each token and head, zeros before and after.
    """
    padded = padded_dim(head_dim)
    result, queries_bytes = result_bytes(padded), group * query_stride(head_dim)
    attend, load = chunk(group, head_dim), load_queries(group, head_dim)

    @kernel(f"attention {group}x{head_dim}, few tokens")
    def attention(arguments, tile, thread):
        (out, out_stride, parts, most_chunks, tiles_at, counters, q, q_stride, positions, slots, block_table, per_slot,
         keys, values, page_bytes, heads, scratch, scratch_each, rotation, half, window, scale, softcap, masks,
         mask_stride, unit) = unpack(arguments, "iiiiiiiiiiiiiiiiiiiiiffiii")  # fmt: skip
        tiles = i32_at(tiles_at)
        which, index = tile // tiles, tile % tiles
        token, kv_head = which // heads, which % heads
        position, head = i32_at(positions + 4 * token), kv_head * group
        o = out + token * out_stride + head * head_dim * 4
        if position < 0 or not any_chosen(masks, mask_stride, unit, token, 1, head, group):
            if index == 0:
                clear(o, group * head_dim)
            return
        first, last = visible(position, window) // CHUNK, position // CHUNK
        chunks = last + 1 - first
        each = (chunks + tiles - 1) // tiles
        start = first + index * each
        if start > last:
            return
        queries = scratch + thread * scratch_each
        load(queries, q + token * q_stride + head * head_dim * 4, position, rotation, half, F32(scale), F32(softcap))
        pages = block_table + 4 * i32_at(slots + 4 * token) * per_slot
        base = parts + which * most_chunks * group * result
        k, v = keys + kv_head * page_bytes, values + kv_head * page_bytes
        for i in range(start, min(start + each, last + 1)):
            attend(base + i * group * result, queries, queries + queries_bytes, k, v, pages, heads * page_bytes,
                   position, 1, i, window, F32(softcap))  # fmt: skip
        if each < chunks:
            if atomic_add(counters + 64 * which, 1) < (chunks + each - 1) // each - 1:
                return
            atomic_store(counters + 64 * which, 0)
        for h in range(group):
            if not chosen(masks, mask_stride, unit, token, head + h):
                clear(o + h * head_dim * 4, head_dim)
                continue
            running = base + (first * group + h) * result
            for i in range(first + 1, last + 1):
                merge(running, base + (i * group + h) * result, padded)
            finish(o + h * head_dim * 4, running, padded, head_dim)

    return attention
