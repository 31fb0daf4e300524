"""Attention of one token, or of a block of consecutive tokens of a slot, over one chunk of the paged float16 cache.

The visible positions are cut into fixed chunks, each with its own softmax maximum, and chunks are merged in order: the
same sums whoever computes them. A block shares each key and value that it loads among its tokens; what only some of its
tokens see is left to every token by itself, so that a result never depends on who else is in the block.
"""

from __future__ import annotations

import functools

import numba
import numpy as np

from cpu_kernels import attention_rows
from cpu_kernels.compile import named
from cpu_kernels.rope import rotate
from cpu_kernels.simd import f32_at, i32_at, load_f32, mul, set_f32, splat_f32, store_f32, zeros
from cpu_kernels.softmax import LOG2_E, begin, result_bytes, weigh

F32 = np.float32
CHUNK = 128
"""Positions with one softmax maximum; a multiple of the page."""
PAGE = 64
BLOCK_ROWS = 24
"""Query heads that a block of tokens aims at: as many sums as AVX-512 keeps in registers."""


def block_tokens(group: int) -> int:
    """Tokens of a block."""
    return max(1, min(8, BLOCK_ROWS // group))


def padded_dim(head_dim: int) -> int:
    """Dimensions of a head in whole vectors."""
    return -(-head_dim // 16) * 16


def query_stride(head_dim: int) -> int:
    """Bytes between rows of queries: a cache line more than they need, so that rows do not compete for a cache set."""
    return padded_dim(head_dim) * 4 + 64


SCORE_STRIDE = CHUNK * 4 + 64
"""Bytes between rows of scores, for the same reason."""


@numba.njit(error_model="numpy")
def visible(position, window):
    """First position that a token sees."""
    return max(position + 1 - window, 0) if window > 0 else 0


@numba.njit(error_model="numpy")
def address(base, pages, page_step, position, row_bytes):
    """Where a position's values, or the keys of 16 positions from it on, lie. pages: the slot's in the block table."""
    return base + i32_at(pages + 4 * (position // PAGE)) * page_step + position % PAGE * row_bytes


@functools.cache
def load_queries(group: int, head_dim: int):
    """Numba function: a token's group of queries, rotated if there is a table, times the score scale."""
    padded, stride = padded_dim(head_dim), query_stride(head_dim)

    @numba.njit(error_model="numpy")
    @named(f"{group}x{head_dim}")
    def load(out, q, position, table, half, scale, softcap):
        factor = scale / softcap if softcap > 0 else scale * LOG2_E
        for h in range(group):
            row, source = out + h * stride, q + h * head_dim * 4
            if padded > head_dim:
                store_f32(row + 4 * (padded - 16), zeros())
            if table != 0:
                rotate(row, source, table + position * half * 8, head_dim, half)
                source = row
            whole = head_dim // 16 * 16
            for i in range(0, whole, 16):
                store_f32(row + 4 * i, mul(load_f32(source + 4 * i), splat_f32(factor)))
            for i in range(whole, head_dim):
                set_f32(row + 4 * i, f32_at(source + 4 * i) * factor)

    return load


@functools.cache
def score_positions(group: int, tokens: int, head_dim: int):
    """Numba function: scores of positions first..last-1, whole vectors, for all rows of a block.

    after: address of what will be read next.
    """
    rows, row_bytes = group * tokens, padded_dim(head_dim) * 2
    shape = (head_dim, query_stride(head_dim), SCORE_STRIDE)
    many = attention_rows.side_by_side(rows, PAGE // 16)
    one_by_one, together = attention_rows.scores(rows, 1, *shape), attention_rows.scores(rows, many, *shape)
    step = 16 * many

    @numba.njit(error_model="numpy")
    @named(f"{rows}x{head_dim}")
    def score(out, queries, keys, pages, page_step, first, last, after):
        p = first
        while p < last:
            end = p + step if p % step == 0 and p + step <= last else p + 16
            at = address(keys, pages, page_step, p, row_bytes)
            ahead = address(keys, pages, page_step, end, row_bytes) if end < last else after
            if end - p == step:
                together(out + 4 * (p - first), queries, at, ahead)
            else:
                one_by_one(out + 4 * (p - first), queries, at, ahead)
            p = end

    return score


@functools.cache
def _add_values(group: int, tokens: int, head_dim: int):
    """Numba function: adds weighted values of positions start..end-1, for all rows of a block."""
    padded = padded_dim(head_dim)
    weighted = attention_rows.weighted_values(group * tokens, padded, SCORE_STRIDE, result_bytes(padded))

    @numba.njit(error_model="numpy")
    @named(f"{group * tokens}x{head_dim}")
    def add(out, weights, values, pages, page_step, start, end):
        p = start
        while p < end:
            stop = min(p // PAGE * PAGE + PAGE, end)
            at = address(values, pages, page_step, p, padded * 2)
            ahead = address(values, pages, page_step, stop, padded * 2) if stop < end else at
            weighted(out, weights + 4 * (p - start), at, ahead, stop - p)
            p = stop

    return add


@functools.cache
def chunk(group: int, head_dim: int):
    """Numba function: attention of the query heads of a token, or of a block's consecutive tokens, over one chunk.

    Its arguments: results, one for each token and head, of which those of tokens that see nothing of the chunk are left
    alone; queries; memory for scores; where keys, values and pages lie; the first token's position and the number
    of tokens, 1 or a block's; the chunk's number; window and softcap.
    """
    padded = padded_dim(head_dim)
    block = block_tokens(group)
    score_all, score_one = (score_positions(group, n, head_dim) for n in (block, 1))
    add_all, add_one = (_add_values(group, n, head_dim) for n in (block, 1))
    result, weights_each = result_bytes(padded), group * SCORE_STRIDE
    results = group * result

    @numba.njit(error_model="numpy")
    @named(f"{group}x{head_dim}")
    def attend(out, queries, work, keys, values, pages, page_step, position, tokens, index, window, softcap):
        bottom, final = index * CHUNK, position + tokens - 1
        lowest, highest = max(visible(position, window), bottom), min(bottom + CHUNK, final + 1)
        origin, limit = lowest // 16 * 16, (highest + 15) // 16 * 16
        first_values = address(values, pages, page_step, origin, padded * 2)
        if tokens == 1:
            score_one(work, queries, keys, pages, page_step, origin, limit, first_values)
        else:
            score_all(work, queries, keys, pages, page_step, origin, limit, first_values)
        for t in range(tokens):
            start, end = max(visible(position + t, window), bottom), min(bottom + CHUNK, position + t + 1)
            if start < end:
                for h in range(group):
                    row = work + t * weights_each + h * SCORE_STRIDE + 4 * (start // 16 * 16 - origin)
                    begin(out + t * results + h * result, row, start, end, padded, softcap)
        for t in range(tokens):
            start, end = max(visible(position + t, window), bottom), min(bottom + CHUNK, position + t + 1)
            if start < end:
                for h in range(group):
                    row = work + t * weights_each + h * SCORE_STRIDE + 4 * (start // 16 * 16 - origin)
                    weigh(out + t * results + h * result, row, start, end, padded)
        # Everybody sees shared..shared_end-1.
        shared, shared_end = max(visible(final, window), bottom), min(bottom + CHUNK, position + 1)
        if tokens == 1 or shared >= shared_end:
            shared = shared_end = bottom + CHUNK
        for t in range(tokens):
            start, end = max(visible(position + t, window), bottom), min(shared, position + t + 1)
            row = work + t * weights_each + 4 * (start - origin)
            add_one(out + t * results, row, values, pages, page_step, start, end)
        if shared < shared_end:
            add_all(out, work + 4 * (shared - origin), values, pages, page_step, shared, shared_end)
        for t in range(tokens):
            start, end = shared_end, min(bottom + CHUNK, position + t + 1)
            row = work + t * weights_each + 4 * (start - origin)
            add_one(out + t * results, row, values, pages, page_step, start, end)

    return attend
