"""The k largest of a row of scores, exactly k, equal ones by their index.

The k-th largest score is found by counting: how many scores are above a limit takes few instructions for 16 of them.
The first limit is where a normal distribution has its k-th largest value, and others lie between those found before, so
that about six counts suffice for scores of a router. Every count also narrows the bounds to scores that exist, and
every other one from some point on halves what is left of the floats' order, which ends the search on any scores.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from cpu_kernels.masks import (
    NAN,
    bits_above,
    bits_equal,
    count_above,
    count_numbers,
    lanes_at,
    low_bits,
    no_counts,
    popcount,
    total_count,
    words,
)
from cpu_kernels.simd import (
    I32,
    I64,
    SINGLE,
    A,
    F,
    S,
    add,
    floats,
    fma,
    largest,
    load_f32,
    op,
    set_i64,
    splat_f32,
    store_f32,
    total,
    zeros,
)

F32 = np.float32
INFINITY = F32(np.inf)
STEADY = 6
"""Counts after which every other one halves the range of floats."""


@op(F(F, F))
def _larger(b, x, y):
    """The larger of two numbers; y if x is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@op(F(F, F))
def _smaller(b, x, y):
    """The smaller of two numbers; y if x is NaN."""
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@op(F(F, F))
def _if_above(b, x, limit):
    """x where it is above a limit, else infinity."""
    return b.select(b.fcmp_ordered(">", x, limit), x, floats(np.inf))


@op(F(F, F))
def _unless_above(b, x, limit):
    """x where it is not above a limit, else minus infinity."""
    return b.select(b.fcmp_ordered(">", x, limit), floats(-np.inf), x)


@op(F(F))
def _if_number(b, x):
    """x, or 0 for NaN."""
    return b.select(b.fcmp_ordered("ord", x, x), x, floats(0))


@op(F(F))
def _negative(b, x):
    return b.fneg(x)


@op(A(S))
def _order_of(b, x):
    """An integer that rises with a float; the same for both zeros."""
    bits = b.sext(b.bitcast(x, I32), I64)
    size = b.and_(bits, I64(0x7FFFFFFF))
    return b.select(b.icmp_signed("<", bits, I64(0)), b.neg(size), size)


@op(S(A))
def _float_of(b, order):
    """The float that `_order_of` takes to an integer."""
    negative = b.icmp_signed("<", order, I64(0))
    size = b.select(negative, b.neg(order), order)
    return b.bitcast(b.trunc(b.select(negative, b.or_(size, I64(0x80000000)), size), I32), SINGLE)


@numba.njit(error_model="numpy")
def _survey(x, n):
    """Smallest and largest number, how many there are (not NaN), and their mean and deviation, roughly."""
    low, high = splat_f32(INFINITY), splat_f32(-INFINITY)
    sums, squares, counts = zeros(), zeros(), no_counts()
    for i in range(0, n, 16):
        v = lanes_at(x + 4 * i, n - i, NAN)
        low, high = _smaller(v, low), _larger(v, high)
        counts = count_numbers(counts, v)
        v = _if_number(v)
        sums, squares = add(sums, v), fma(v, v, squares)
    mean = total(sums) / F32(n)
    deviation = F32(math.sqrt(total(squares) / F32(n) - mean * mean))
    return -largest(_negative(low)), largest(high), total_count(counts), mean, deviation


@numba.njit(error_model="numpy")
def _count(x, n, limit):
    """How many of n scores are above a limit, the largest that is not, and the smallest that is."""
    bound, counts = splat_f32(limit), no_counts()
    below, above = splat_f32(-INFINITY), splat_f32(INFINITY)
    for i in range(0, n, 16):
        v = lanes_at(x + 4 * i, n - i, NAN)
        counts = count_above(counts, v, bound)
        below = _larger(_unless_above(v, bound), below)
        above = _smaller(_if_above(v, bound), above)
    return total_count(counts), largest(below), -largest(_negative(above))


@numba.njit(error_model="numpy")
def _kth_largest(x, n, k, quantile):
    """A limit above which all scores are among the k largest, and how many of those that equal it are, too.

    A limit of NaN means that all numbers are, and some NaN.

    Args:
        k: from 1 to n - 1.
        quantile: standard deviations above the mean at which a normal distribution has its k-th largest of n.
    """
    low, high, at_low, mean, deviation = _survey(x, n)
    if k > at_low:
        return NAN, k - at_low
    above_high = 0
    limit = mean + F32(quantile) * deviation
    # Scores for each unit of the limit there, if they are distributed like that.
    density = F32(n * 0.3989 * math.exp(-0.5 * quantile * quantile)) / deviation
    rounds = 0
    while low < high:
        if (rounds >= STEADY and rounds & 1) or not (low <= limit < high):
            limit = _float_of((_order_of(low) + _order_of(high)) >> 1)
        count, below, above = _count(x, n, limit)
        if count == k:
            return limit, 0
        if count < k:
            high, above_high = below, count
        else:
            low, at_low = above, count
        if rounds == 0:
            # A little beyond the aim, so that it lies between the two limits.
            miss = F32(count - k)
            limit += (miss + F32(math.copysign(2, miss)) + miss * F32(0.125)) / density
        else:
            share = (F32(at_low - k) + F32(0.5)) / F32(at_low - above_high)
            limit = low + (high - low) * share
        rounds += 1
    return high, k - above_high


@numba.njit(error_model="numpy")
def _word(x, n, limit):
    """Bits of up to 64 scores that are selected for certain, and of those that others like them may outrun."""
    sure, equal, bound = 0, 0, splat_f32(limit)
    for i in range(0, min(n, 64), 16):
        v = lanes_at(x + 4 * i, n - i, NAN)
        sure |= bits_above(v, bound, 0) << i
        equal |= bits_equal(v, bound) << i
    return sure, equal


@numba.njit(error_model="numpy")
def _word_of_numbers(x, n):
    """Bits of up to 64 scores that are numbers, and of those that are not."""
    numbers, bound = 0, splat_f32(-INFINITY)
    for i in range(0, min(n, 64), 16):
        numbers |= bits_above(lanes_at(x + 4 * i, n - i, NAN), bound, 1) << i
    return numbers, ~numbers & low_bits(n)


@numba.njit(error_model="numpy")
def top_k(mask, x, n, k, quantile):
    """Sets the bits of the k largest of n scores; of equal ones the first. NaN is below all numbers.

    Args:
        quantile: standard deviations above the mean at which a normal distribution has its k-th largest of n.
    """
    limit, rest = NAN, 0
    if 0 < k < n:
        limit, rest = _kth_largest(x, n, k, quantile)
    for w in range(words(n)):
        at, left = x + 256 * w, n - 64 * w
        if k <= 0:
            bits, equal = 0, 0
        elif k >= n:
            bits, equal = low_bits(left), 0
        elif math.isnan(limit):
            bits, equal = _word_of_numbers(at, left)
        else:
            bits, equal = _word(at, left, limit)
        if popcount(equal) <= rest:
            bits, rest = bits | equal, rest - popcount(equal)
        while rest > 0 and equal & ~bits != 0:
            first = equal & ~bits
            bits |= first & -first
            rest -= 1
        set_i64(mask + 8 * w, bits)


@numba.njit(error_model="numpy")
def sum_votes(out, scores, stride, tokens, first, n):
    """Sums over tokens of the scores above 0, for n units (to whole vectors) from the first on. NaN has no vote."""
    for i in range(first, first + n, 16):
        sums = zeros()
        for token in range(tokens):
            sums = add(sums, _larger(load_f32(scores + token * stride + 4 * i), zeros()))
        store_f32(out + 4 * i, sums)
