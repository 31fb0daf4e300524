"""Selections made of scores: kernels that turn a row of them into a mask.

A tile is a row. Each kernel's own arguments are followed by those of `chosen.finish_selection`, which it ends with.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from cpu_kernels.chosen import finish_selection
from cpu_kernels.compile import kernel, unpack
from cpu_kernels.masks import NAN, bits_above, lanes_at, words
from cpu_kernels.rows import activate
from cpu_kernels.simd import (
    absolute,
    add,
    f32_at,
    fma,
    largest,
    load_f32,
    maximum,
    mul,
    set_f32,
    set_i64,
    splat_f32,
    store_f32,
    sub,
    total,
    zeros,
)
from cpu_kernels.top_k import INFINITY, sum_votes, top_k

F32 = np.float32
SPAN = 256
"""Values that are added up in float32, before such sums are in float64."""


@numba.njit(error_model="numpy")
def _largest_of_groups(out, x, n, group):
    """The largest of each of n groups of scores; NaN only if there is no number."""
    for i in range(n):
        peak = NAN
        for j in range(group):
            score = f32_at(x + 4 * (i * group + j))
            if score > peak or math.isnan(peak):
                peak = score
        set_f32(out + 4 * i, peak)


@kernel("votes")
def votes(arguments, tile, thread):
    """Sums over tokens of the scores above 0, a tile for so many units."""
    out, scores, stride, tokens, each, n = unpack(arguments, "iiiiii")
    sum_votes(out, scores, stride, tokens, tile * each, min(each, n - tile * each))


@kernel("select top k")
def select_topk(arguments, tile, thread):
    """The k largest of n scores, or of the largest of each of n groups of them, or of the votes of all tokens.

    tokens: whose votes are to be summed to `work`; 0 if each has a row of its own.
    """
    scores, stride, n, group, k, quantile, tokens, work, work_stride = unpack(arguments, "iiiiifiii")
    tail = arguments + 72
    masks, units = unpack(tail, "ii")
    x = scores + tile * stride
    if tokens != 0:
        x = work
        sum_votes(x, scores, stride, tokens, 0, n)
    elif group > 1:
        x = work + tile * work_stride
        _largest_of_groups(x, scores + tile * stride, n, group)
    top_k(masks + 8 * tile * words(units), x, n, k, quantile)
    finish_selection(tail, tile)


@numba.njit(error_model="numpy")
def _value(x, left, sizes):
    v = lanes_at(x, left, NAN)
    return absolute(v) if sizes else v


@numba.njit(error_model="numpy")
def _peak(x, n, sizes):
    """The largest number; minus infinity if there is none."""
    peaks = splat_f32(-INFINITY)
    for i in range(0, n, 16):
        peaks = maximum(_value(x + 4 * i, n - i, sizes), peaks)
    return largest(peaks)


@kernel("select threshold")
def select_threshold(arguments, tile, thread):
    """Scores above a threshold, or at least at the threshold times the largest; NaN never.

    sizes: whether scores count without their sign. factors: of the units, where nothing is relative; 0 for none.
    """
    scores, stride, n, threshold, relative, sizes, factors = unpack(arguments, "iiifiii")
    tail = arguments + 56
    masks, units = unpack(tail, "ii")
    x, mask, limit = scores + tile * stride, masks + 8 * tile * words(units), F32(threshold)
    if relative:
        peak = _peak(x, n, sizes)
        limit *= peak
        if not limit <= peak:
            # Of negative scores the largest is selected at least.
            limit = peak
    bound = splat_f32(limit)
    for w in range(words(n)):
        bits = 0
        for i in range(64 * w, min(64 * w + 64, n), 16):
            value = _value(x + 4 * i, n - i, sizes)
            if factors != 0:
                value = mul(value, load_f32(factors + 4 * i))
            bits |= bits_above(value, bound, relative) << (i & 63)
        set_i64(mask + 8 * w, bits)
    finish_selection(tail, tile)


@numba.njit(error_model="numpy")
def _mean(x, n):
    result = 0.0
    for first in range(0, n, SPAN):
        sums = zeros()
        for i in range(first, min(first + SPAN, n), 16):
            sums = add(sums, lanes_at(x + 4 * i, n - i, F32(0)))
        result += total(sums)
    return result / n


@numba.njit(error_model="numpy")
def _deviation(x, n, mean):
    """Of the whole population."""
    result, middle = 0.0, splat_f32(F32(mean))
    for first in range(0, n, SPAN):
        squares = zeros()
        for i in range(first, min(first + SPAN, n), 16):
            v = sub(lanes_at(x + 4 * i, n - i, F32(mean)), middle)
            squares = fma(v, v, squares)
        result += total(squares)
    return math.sqrt(result / n)


@kernel("statistical top k")
def statistical_topk(arguments, tile, thread):
    """What exceeds the mean by so many deviations, minus that; 0 for the rest; then an activation, if its kind is >= 0.

    To be selected, scores must leave something above 0. A row with NaN selects nothing.
    """
    scores, stride, n, factor, out, out_stride, kind = unpack(arguments, "iiifiii")
    tail = arguments + 56
    masks, units = unpack(tail, "ii")
    x, to, mask = scores + tile * stride, out + tile * out_stride, masks + 8 * tile * words(units)
    mean = _mean(x, n)
    limit, zero = splat_f32(F32(mean + factor * _deviation(x, n, mean))), zeros()
    for w in range(words(n)):
        bits = 0
        for i in range(64 * w, min(64 * w + 64, n), 16):
            rest = maximum(sub(lanes_at(x + 4 * i, n - i, NAN), limit), zero)
            found = bits_above(rest, zero, 0)
            bits |= found << (i & 63)
            if kind >= 0 and found != 0:
                rest = activate(rest, kind)
            store_f32(to + 4 * i, rest)
        set_i64(mask + 8 * w, bits)
    finish_selection(tail, tile)
