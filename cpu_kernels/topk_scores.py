"""The first half of top-k attention: scores over a part of each key, and the threshold that leaves about k of them.

The threshold is the scores' mean plus their population standard deviation times the normal quantile of 1 - k / visible:
were they normally distributed, k would be above it. The fixed chunks of `attention_chunk` are described one by one and
joined in order, so that a token's threshold is its own, whoever computes it.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numba
import numpy as np
from numpy.typing import NDArray

from cpu_kernels import simd
from cpu_kernels.attention_chunk import CHUNK, SCORE_STRIDE, address, block_tokens, padded_dim, score_positions, visible
from cpu_kernels.compile import named
from cpu_kernels.rows import tanh
from cpu_kernels.simd import (
    A,
    F,
    add,
    f32_at,
    fma,
    largest,
    load_f32,
    maximum,
    mul,
    op,
    set_f32,
    splat_f32,
    store_f32,
    sub,
    total,
    zeros,
)
from cpu_kernels.softmax import LOG2_E

F32 = np.float32
DESCRIPTION = 16
"""Bytes that describe a chunk's scores of one query head: the largest, the mean, the sum of squares around it."""
LIMITS = 8
"""Bytes of a query head's threshold and its largest score."""


@functools.lru_cache(maxsize=8)
def quantiles(k: int, longest: int) -> NDArray[np.float32]:
    """Standard normal quantiles of 1 - k / n for n = 0..longest visible keys; 0 up to n = k, where there is none."""
    normal, table = NormalDist(), np.zeros(longest + 1, np.float32)
    table[k + 1 :] = [normal.inv_cdf(1 - k / n) for n in range(k + 1, longest + 1)]
    return table


@op(F(F, A, A, F))
def lanes_or(b, v, first, end, other):
    """Lanes first..end-1 of v, the others of `other`."""
    lane = simd.ir.Constant(simd.I.llvm, list(range(simd.LANES)))
    above = b.icmp_signed(">=", lane, simd.splat(b, b.trunc(first, simd.I32)))
    below = b.icmp_signed("<", lane, simd.splat(b, b.trunc(end, simd.I32)))
    return b.select(b.and_(above, below), v, other)


@numba.njit(error_model="numpy")
def _describe(out, scores, start, end, softcap):
    """Caps and describes the scores of positions start..end-1. scores: of the 16 positions around `start` and on."""
    first, last, none = start // 16 * 16, (end + 15) // 16 * 16, splat_f32(F32(-np.inf))
    peaks, sums = none, zeros()
    for p in range(first, last, 16):
        at = scores + 4 * (p - first)
        v = load_f32(at)
        if softcap > 0:
            v = mul(splat_f32(softcap * LOG2_E), tanh(v))
            store_f32(at, v)
        peaks = maximum(lanes_or(v, start - p, end - p, none), peaks)
        sums = add(sums, lanes_or(v, start - p, end - p, zeros()))
    mean = total(sums) / F32(end - start)
    centre, squares = splat_f32(mean), zeros()
    for p in range(first, last, 16):
        v = lanes_or(sub(load_f32(scores + 4 * (p - first)), centre), start - p, end - p, zeros())
        squares = fma(v, v, squares)
    set_f32(out, largest(peaks))
    set_f32(out + 4, mean)
    set_f32(out + 8, total(squares))


@numba.njit(error_model="numpy")
def limits(out, descriptions, each, position, window, k, table):
    """A query head's threshold, -inf where no more than k keys are visible, and its largest score.

    Args:
        descriptions: of chunk 0's scores; chunks are `each` bytes apart.
        table: of `quantiles`.
    """
    start = visible(position, window)
    seen, mean, squares, peak = 0.0, 0.0, 0.0, F32(-np.inf)
    for index in range(start // CHUNK, position // CHUNK + 1):
        at = descriptions + index * each
        n = float(min(index * CHUNK + CHUNK, position + 1) - max(index * CHUNK, start))
        away = np.float64(f32_at(at + 4)) - mean
        mean += away * n / (seen + n)
        squares += np.float64(f32_at(at + 8)) + away * away * seen * n / (seen + n)
        seen += n
        peak = max(peak, f32_at(at))
    all_of_them = position + 1 - start <= k
    deviation = math.sqrt(squares / seen)
    quantile = f32_at(table + 4 * (position + 1 - start))
    set_f32(out, F32(-np.inf) if all_of_them else F32(mean + quantile * deviation))
    set_f32(out + 4, peak)


@functools.cache
def score_chunk(group: int, dims: int):
    """Numba function: scores of a token's group of heads, or of a block's tokens, over a chunk, and their descriptions.

    Its arguments: scores [rows][SCORE_STRIDE], whose first is that of the chunk's first position; descriptions [rows];
    queries; where keys and pages lie; the first token's position and the number of tokens, 1 or a block's; the chunk's
    number and that of the last chunk; window and softcap.
    """
    block, row_bytes = block_tokens(group), padded_dim(dims) * 2
    score_all, score_one = (score_positions(group, n, dims) for n in (block, 1))

    @numba.njit(error_model="numpy")
    @named(f"{group}x{dims}")
    def score(scores, descriptions, queries, keys, pages, page_step, position, tokens, index, newest, window, softcap):
        bottom = index * CHUNK
        first = max(visible(position, window), bottom) // 16 * 16
        last = (min(bottom + CHUNK, position + tokens) + 15) // 16 * 16
        ahead = address(keys, pages, page_step, bottom + CHUNK if index < newest else bottom, row_bytes)
        at = scores + 4 * (first - bottom)
        if tokens == 1:
            score_one(at, queries, keys, pages, page_step, first, last, ahead)
        else:
            score_all(at, queries, keys, pages, page_step, first, last, ahead)
        for t in range(tokens):
            start, end = max(visible(position + t, window), bottom), min(bottom + CHUNK, position + t + 1)
            if start < end:
                for row in range(t * group, t * group + group):
                    at = scores + row * SCORE_STRIDE + 4 * (start // 16 * 16 - bottom)
                    _describe(descriptions + row * DESCRIPTION, at, start, end, softcap)

    return score
