"""The softmax of one query head over a chunk of positions, in powers of two, and how chunks are joined.

Scores come multiplied by log2(e), so that weights are 2**(score - largest score). A chunk's result is a weighted sum
[padded], then the largest score and the sum of weights, in float32.
"""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels import simd
from cpu_kernels.rows import tanh
from cpu_kernels.simd import (
    F,
    add,
    f32_at,
    keep_lanes,
    largest,
    load_f32,
    maximum,
    mul,
    op,
    set_f32,
    splat_f32,
    store_f32,
    total,
    zeros,
)

F32 = np.float32
LOG2_E = F32(1.4426950408889634)
ROUNDING = 1.5 * 2.0**23
"""A float32 of this size has no bits behind the point: adding it rounds, and leaves the integer in the low bits."""
POWER_OF_TWO = (
    1.5353393235e-04,
    1.3398882626e-03,
    9.6184373004e-03,
    5.5503324451e-02,
    2.4022647913e-01,
    6.9314720287e-01,
    1.0,
)
"""2**r for -1/2 <= r <= 1/2, highest power first; relative error 2e-9. Fitted by least squares, reweighted."""


@op(F(F))
def exp2(b, x):
    """2**x for x <= 0, to float32's rounding; exactly 1 at 0 and exactly 0 below -126. NaN stays NaN."""
    shifted = b.fadd(x, simd.floats(ROUNDING))
    r = b.fsub(x, b.fsub(shifted, simd.floats(ROUNDING)))
    p = simd.floats(POWER_OF_TWO[0])
    for c in POWER_OF_TWO[1:]:
        p = simd.fma.build(b, p, r, simd.floats(c))
    exponent = b.shl(b.bitcast(shifted, simd.I.llvm), simd.ints(23))
    result = b.bitcast(b.add(b.bitcast(p, simd.I.llvm), exponent), F.llvm)
    return b.select(b.fcmp_ordered("<", x, simd.floats(-126)), simd.floats(0), result)


def result_bytes(padded: int) -> int:
    """A chunk's result for one head."""
    return padded * 4 + 64


@numba.njit(error_model="numpy")
def begin(result, scores, start, end, padded, softcap):
    """Starts a result with the largest score and a sum of zeros; caps and masks the scores.

    scores: of the 16 positions around `start` and on; those outside of start..end-1 become too small to count.
    """
    first, last = start // 16 * 16, (end + 15) // 16 * 16
    if softcap > 0:
        cap = splat_f32(softcap * LOG2_E)
        for at in range(scores, scores + 4 * (last - first), 64):
            store_f32(at, mul(cap, tanh(load_f32(at))))
    store_f32(scores, keep_lanes(load_f32(scores), start - first, end - first))
    edge = scores + 4 * (last - 16 - first)
    store_f32(edge, keep_lanes(load_f32(edge), start - (last - 16), end - (last - 16)))
    peaks = splat_f32(F32(-1e30))
    for at in range(scores, scores + 4 * (last - first), 64):
        peaks = maximum(load_f32(at), peaks)
    for i in range(0, padded, 16):
        store_f32(result + 4 * i, zeros())
    set_f32(result + padded * 4, largest(peaks))


@numba.njit(error_model="numpy")
def weigh(result, scores, start, end, padded):
    """Turns the scores that `begin` left into weights, 0 outside of start..end-1, and notes their sum.

    It is not a part of `begin` so that a row need not wait for its own largest score while others could be weighed.
    """
    shift, weights = splat_f32(-f32_at(result + padded * 4)), zeros()
    for at in range(scores, scores + 4 * ((end + 15) // 16 * 16 - start // 16 * 16), 64):
        e = exp2(add(load_f32(at), shift))
        store_f32(at, e)
        weights = add(weights, e)
    set_f32(result + padded * 4 + 4, total(weights))


@numba.njit(error_model="numpy")
def merge(result, part, padded):
    """Takes the next chunk's result of a head into that of the chunks before."""
    numbers, more = result + padded * 4, part + padded * 4
    old, new = f32_at(numbers), f32_at(more)
    peak = max(old, new)
    # One of the two factors is 1.
    less, one = exp2(splat_f32(min(old, new) - peak)), splat_f32(F32(1))
    keep, gain = (one, less) if new < old else (less, one)
    for i in range(0, padded, 16):
        store_f32(result + 4 * i, add(mul(load_f32(result + 4 * i), keep), mul(load_f32(part + 4 * i), gain)))
    both = add(mul(keep, splat_f32(f32_at(numbers + 4))), mul(gain, splat_f32(f32_at(more + 4))))
    set_f32(numbers, peak)
    set_f32(numbers + 4, largest(both))


@numba.njit(error_model="numpy")
def finish(out, result, padded, head_dim):
    """Writes the weighted sum over the sum of weights [head_dim]."""
    inverse = F32(1) / f32_at(result + padded * 4 + 4)
    whole = head_dim // 16 * 16
    scale = splat_f32(inverse)
    for i in range(0, whole, 16):
        store_f32(out + 4 * i, mul(load_f32(result + 4 * i), scale))
    for i in range(whole, head_dim):
        set_f32(out + 4 * i, f32_at(result + 4 * i) * inverse)
