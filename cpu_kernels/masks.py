"""Masks: a bit for each unit of a selection (neuron, block of neurons, expert, head, input), in 64-bit words.

Bits beyond the last unit are 0.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir

from cpu_kernels.simd import I16, I32, I64, LANES, A, F, I, S, call, i64_at, ints, load_f32, op, set_i64, splat

F32 = np.float32
NAN = F32(np.nan)
BIT = ir.IntType(1)


@op(A(A))
def popcount(b, x):
    return call(b, "llvm.ctpop.i64", I64, [x])


@op(A(A))
def lowest_bit(b, x):
    """Number of the lowest bit that is 1; 64 if there is none."""
    return call(b, "llvm.cttz.i64", I64, [x, BIT(0)])


@op(A(A))
def highest_bit(b, x):
    """Number of the highest bit that is 1; -1 if there is none."""
    return b.sub(I64(63), call(b, "llvm.ctlz.i64", I64, [x, BIT(0)]))


def _bits(b, lanes):
    return b.zext(b.bitcast(lanes, I16), I64)


@op(A(F, F, A))
def bits_above(b, x, limit, closed):
    """16 bits: lanes of x above a limit's; with closed, at it too. NaN is neither."""
    equal = b.and_(b.fcmp_ordered("==", x, limit), splat(b, b.trunc(closed, BIT)))
    return _bits(b, b.or_(b.fcmp_ordered(">", x, limit), equal))


@op(A(F, F))
def bits_equal(b, x, y):
    return _bits(b, b.fcmp_ordered("==", x, y))


@op(F(F, A, S))
def first_lanes(b, x, n, other):
    """The first n lanes of x, the others something else."""
    lane = ir.Constant(I.llvm, list(range(LANES)))
    return b.select(b.icmp_signed("<", lane, splat(b, b.trunc(n, I32))), x, splat(b, other))


@op(I(I, F, F))
def count_above(b, counts, x, limit):
    """Adds 1 to the lanes in which x is above a limit."""
    return b.sub(counts, b.sext(b.fcmp_ordered(">", x, limit), I.llvm))


@op(I(I, F))
def count_numbers(b, counts, x):
    """Adds 1 to the lanes in which x is not NaN."""
    return b.sub(counts, b.sext(b.fcmp_ordered("ord", x, x), I.llvm))


@op(A(I))
def total_count(b, v):
    return b.sext(call(b, "llvm.vector.reduce.add.v16i32", I32, [v]), I64)


@op(I())
def no_counts(b):
    return ints(0)


@op(A(A))
def mixed(b, x):
    """64 bits that look random, a different value for every x. Source: the finalizer of SplitMix64 (Steele et al.)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = b.mul(b.xor(x, b.lshr(x, I64(shift))), I64(factor))
    return b.xor(x, b.lshr(x, I64(31)))


@numba.njit(error_model="numpy")
def lanes_at(x, left, other):
    """16 floats, those beyond the `left` first replaced."""
    v = load_f32(x)
    return v if left >= 16 else first_lanes(v, left, other)


@numba.njit(error_model="numpy")
def low_bits(n):
    """A word with the lowest n bits."""
    return -1 if n >= 64 else (1 << n) - 1


@numba.njit(error_model="numpy")
def words(units):
    """64-bit words of a row."""
    return (units + 63) >> 6


@numba.njit(error_model="numpy")
def clear(mask, units):
    for w in range(words(units)):
        set_i64(mask + 8 * w, 0)


@numba.njit(error_model="numpy")
def _set_range(mask, first, end):
    for w in range(first >> 6, ((end - 1) >> 6) + 1):
        bits = low_bits(end - 64 * w) & ~low_bits(max(first - 64 * w, 0))
        set_i64(mask + 8 * w, i64_at(mask + 8 * w) | bits)


@numba.njit(error_model="numpy")
def expand(mask, neurons, blocks, block):
    """Makes a mask of neurons from one of blocks of `block` neurons, the last of which may be cut off."""
    clear(mask, neurons)
    for w in range(words((neurons + block - 1) // block)):
        left = i64_at(blocks + 8 * w)
        while left != 0:
            first = (64 * w + lowest_bit(left)) * block
            _set_range(mask, first, min(first + block, neurons))
            left &= left - 1


STEP = -7046029254386353131
"""Between the counters that are mixed to random words: 2**64 divided by the golden ratio, as SplitMix64 has it."""


@numba.njit(error_model="numpy")
def _sprinkle(mask, n, k, state):
    """Sets each of n bits with the same chance, a little below k/n. Returns how many, and the state."""
    share = k / n
    chance = int(256 * max(share - 2 * np.sqrt(share * (1 - share) / n), 0.0))
    count = 0
    for w in range(words(n)):
        word = 0
        for digit in range(lowest_bit(chance), 8):
            # A random bit for each binary digit of the chance, from the lowest that is 1.
            state += STEP
            word = word | mixed(state) if chance >> digit & 1 else word & mixed(state)
        word &= low_bits(n - 64 * w)
        set_i64(mask + 8 * w, word)
        count += popcount(word)
    return count, state


@numba.njit(error_model="numpy")
def random_mask(mask, n, k, place):
    """Sets k of n bits (at most 2**31), each such choice as likely as any other. place: of a state, which moves on."""
    rare = min(k, n - k)
    count, state = _sprinkle(mask, n, rare, i64_at(place))
    while count != rare:
        state += STEP
        at = ((mixed(state) >> 33) & 0x7FFFFFFF) * n >> 31
        word, bit = mask + 8 * (at >> 6), 1 << (at & 63)
        if (i64_at(word) & bit == 0) == (count < rare):
            set_i64(word, i64_at(word) ^ bit)
            count += 1 if count < rare else -1
    set_i64(place, state)
    if rare < k:
        for w in range(words(n)):
            set_i64(mask + 8 * w, ~i64_at(mask + 8 * w) & low_bits(n - 64 * w))
