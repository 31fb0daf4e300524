"""The second half of top-k attention: the weights and values of the positions whose scores are above the threshold.

Positions are cut into fixed spans whose sums are joined in order, the same sums whoever computes them. In a span a
query head's survivors are listed first, while their keys are fetched, then weighed, while their values are fetched.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
from llvmlite import ir

from cpu_kernels import attention_rows, simd
from cpu_kernels.attention_chunk import CHUNK, PAGE, SCORE_STRIDE, padded_dim, query_stride, visible
from cpu_kernels.compile import named
from cpu_kernels.exponential import exp
from cpu_kernels.simd import (
    A,
    F,
    S,
    absolute,
    add,
    div,
    f32_at,
    fma,
    i32_at,
    i64_at,
    load_f16,
    load_f32,
    mul,
    op,
    prefetch_l2,
    set_f32,
    set_i64,
    splat_f32,
    store_f32,
    sub,
    total,
    zeros,
)
from cpu_kernels.softmax import exp2, result_bytes
from cpu_kernels.topk_scores import LIMITS

F32 = np.float32
SPAN = 4 * CHUNK
"""Positions whose survivors are summed at once."""
LISTED = SPAN + 16
WORK = LISTED * 16
"""Bytes to list a span's survivors: int64 rows, float32 scores, float32 products that become weights."""


@op(A(F, S, S))
def _above(b, v, threshold, peak):
    """A bit for each lane above the threshold, or as large as the largest, which may not be above it; and for NaN."""
    above = b.fcmp_unordered(">", v, simd.splat(b, threshold))
    top = b.fcmp_ordered("==", v, simd.splat(b, peak))
    return b.zext(b.bitcast(b.or_(above, top), simd.I16), simd.I64)


@op(A(A))
def _lowest(b, bits):
    """Number of the lowest bit that is set."""
    return b.cttz(bits, ir.IntType(1)(1))


@op(F(F))
def _positive(b, x):
    """max(x, 0), and NaN for NaN."""
    return b.select(b.fcmp_ordered("<", x, simd.floats(0)), simd.floats(0), x)


@numba.njit(error_model="numpy")
def softplus(x):
    """log(1 + e**x) to about 2e-7 relative."""
    t = exp(sub(zeros(), absolute(x)))
    # log(1 + t) = 2 artanh(t / (2 + t)), whose argument is at most 1/3.
    z = div(t, add(t, splat_f32(F32(2))))
    square, series = mul(z, z), splat_f32(F32(2 / 17))
    for power in (15, 13, 11, 9, 7, 5, 3, 1):
        series = fma(series, square, splat_f32(F32(2) / F32(power)))
    return fma(series, z, _positive(x))


@functools.cache
def _survivors(key_dims: int):
    """Numba function: adds a chunk's survivors to lists, and fetches the rest of their keys, [.][key_dims] float16."""

    @numba.njit(error_model="numpy")
    @named(f"{key_dims}")
    def survivors(rows, scores, n, limits, chunk_scores, keys, pages, heads, kv_head, first, last):
        threshold, peak = f32_at(limits), f32_at(limits + 4)
        for p in range(first // 16 * 16, last, 16):
            at = chunk_scores + 4 * (p % CHUNK)
            bits = _above(load_f32(at), threshold, peak)
            if p < first:
                bits &= -1 << (first - p)
            if p + 16 > last:
                bits &= (1 << (last - p)) - 1
            if bits != 0:
                row = (i32_at(pages + 4 * (p // PAGE)) * heads + kv_head) * PAGE + p % PAGE
                while bits != 0:
                    lane = _lowest(bits)
                    bits &= bits - 1
                    set_i64(rows + 8 * n, row + lane)
                    set_f32(scores + 4 * n, f32_at(at + 4 * lane))
                    n += 1
                    for line in range(0, key_dims * 2, 64):
                        prefetch_l2(keys + (row + lane) * key_dims * 2 + line)
        return n

    return survivors


@functools.cache
def _products(key_dims: int, value_dims: int):
    """Numba function: products of a query and the keys of listed rows; fetches the rows' values."""

    @numba.njit(error_model="numpy")
    @named(f"{key_dims}x{value_dims}")
    def products(out, rows, n, query, keys, values):
        for i in range(n):
            row = i64_at(rows + 8 * i)
            for line in range(0, value_dims * 2, 64):
                prefetch_l2(values + row * value_dims * 2 + line)
            sums, key = zeros(), keys + row * key_dims * 2
            for d in range(0, key_dims, 16):
                sums = fma(load_f16(key + 2 * d), load_f32(query + 4 * d), sums)
            set_f32(out + 4 * i, total(sums))

    return products


@numba.njit(error_model="numpy")
def _weigh(weights, scores, n, peak):
    """Turns products into weights. Returns the sum of the softmax's weights. scores: filled up to a whole vector."""
    for i in range(n, (n + 15) // 16 * 16):
        set_f32(scores + 4 * i, F32(-np.inf))
        set_f32(weights + 4 * i, F32(0))
    sums, shift = zeros(), splat_f32(-peak)
    for i in range(0, n, 16):
        e = exp2(add(load_f32(scores + 4 * i), shift))
        sums = add(sums, e)
        store_f32(weights + 4 * i, mul(e, softplus(load_f32(weights + 4 * i))))
    return total(sums)


@functools.cache
def span_values(group: int, head_dim: int, first_dims: int):
    """Numba function: of each of a token's heads of a group the weighted sum of a span's survivors, and a weights' sum.

    Its arguments: results; the heads' `topk_scores.limits`; scores, as if chunk 0's were the first, and the bytes
    between those of chunks; the rest of the queries; WORK bytes; where the rest of keys, the values, and the slot's
    pages lie; the number of KV heads and which one it is; the token's position, the span's number, and the window.
    """
    padded, rest = padded_dim(head_dim), padded_dim(head_dim - first_dims)
    survivors, products, add_values = _survivors(rest), _products(rest, padded), attention_rows.listed_values(padded)
    queries_each, result = query_stride(head_dim - first_dims), result_bytes(padded)

    @numba.njit(error_model="numpy")
    @named(f"{group}x{head_dim}_{first_dims}")
    def values_of(out, limits, scores, each, queries, work, keys, values, pages, heads, kv_head, position, span,
                  window):  # fmt: skip
        start, end = max(visible(position, window), span * SPAN), min(span * SPAN + SPAN, position + 1)
        listed, weights = work + 8 * LISTED, work + 12 * LISTED
        for h in range(group):
            limit, n = limits + h * LIMITS, 0
            for index in range(start // CHUNK, (end - 1) // CHUNK + 1):
                first, last = max(start, index * CHUNK), min(end, index * CHUNK + CHUNK)
                at = scores + index * each + h * SCORE_STRIDE
                n = survivors(work, listed, n, limit, at, keys, pages, heads, kv_head, first, last)
            products(weights, work, n, queries + h * queries_each, keys, values)
            sums = _weigh(weights, listed, n, f32_at(limit + 4))
            add_values(out + h * result, weights, work, values, n)
            set_f32(out + h * result + padded * 4 + 4, sums)

    return values_of


@numba.njit(error_model="numpy")
def join(result, part, padded):
    """Adds the next span's results of a head to those of the spans before."""
    for i in range(0, padded, 16):
        store_f32(result + 4 * i, add(load_f32(result + 4 * i), load_f32(part + 4 * i)))
    sums = result + padded * 4 + 4
    set_f32(sums, f32_at(sums) + f32_at(part + padded * 4 + 4))
