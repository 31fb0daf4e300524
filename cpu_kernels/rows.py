"""Operations on rows of activations: norms, activation functions, sums, and the rounding to int8."""

from __future__ import annotations

import math

import numba
import numpy as np

from cpu_kernels.compile import kernel, unpack
from cpu_kernels.simd import (
    absolute,
    add,
    add_i32,
    div,
    exp,
    f32_at,
    fma,
    i32_at,
    largest,
    load_f32,
    maximum,
    mul,
    round_to_i32,
    set_f32,
    set_i32,
    splat_f32,
    store_f32,
    store_i8,
    sub,
    to_float,
    total,
    total_i32,
    zeros,
)

F32 = np.float32


@numba.njit(error_model="numpy")
def quantize_row(x, q, meta, n):
    """int8 planes of n floats (n a multiple of 32), one scale per 32.

    q holds n bytes of the first plane, then n of the second. Per group, 8 words of meta: scale d, d * sum, sum (int32)
    of the first plane; the same of both planes together, in steps of d / 256; then the two integer sums over the first
    16 values alone. A group of zeros gives
    zeros; NaN or infinity anywhere makes the scale NaN, so that it is not lost.
    """
    for group in range(n // 32):
        at = x + group * 128
        v0, v1 = load_f32(at), load_f32(at + 64)
        peak = largest(maximum(absolute(v0), absolute(v1)))
        poison = total(mul(add(v0, v1), zeros()))
        d = peak / F32(127) + poison
        inverse = F32(127) / peak if peak > F32(1e-30) else F32(0)
        step = splat_f32(inverse)
        fine = splat_f32(inverse * F32(256))
        back = splat_f32(-d)
        h0, h1 = round_to_i32(mul(v0, step)), round_to_i32(mul(v1, step))
        l0 = round_to_i32(_low(mul(fma(to_float(h0), back, v0), fine)))
        l1 = round_to_i32(_low(mul(fma(to_float(h1), back, v1), fine)))
        here = q + group * 32
        store_i8(here, h0)
        store_i8(here + 16, h1)
        store_i8(here + n, l0)
        store_i8(here + n + 16, l1)
        half = total_i32(h0)
        high = half + total_i32(h1)
        half_both = half * 256 + total_i32(l0)
        both = high * 256 + total_i32(add_i32(l0, l1))
        m = meta + group * 32
        set_f32(m, d)
        set_f32(m + 4, d * F32(high))
        set_i32(m + 8, high)
        set_f32(m + 12, d / F32(256))
        set_f32(m + 16, d / F32(256) * F32(both))
        set_i32(m + 20, both)
        set_i32(m + 24, half)
        set_i32(m + 28, half_both)


@numba.njit(error_model="numpy")
def _low(v):
    """At most 127: a remainder of exactly half a step would round to 128."""
    limit = splat_f32(F32(127))
    return sub(zeros(), maximum(sub(zeros(), v), sub(zeros(), limit)))


@numba.njit(error_model="numpy")
def _maybe_quantize(out, stride, q, meta, row, n):
    if q != 0:
        quantize_row(out + row * stride, q + row * 2 * n, meta + row * n, n)


@kernel("quantize")
def quantize(arguments, tile, thread):
    x, stride, q, meta, n = unpack(arguments, "iiiii")
    _maybe_quantize(x, stride, q, meta, tile, n)


@numba.njit(error_model="numpy")
def _sum_of_squares(x, mean, n):
    squares = zeros()
    shift = splat_f32(-mean)
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        v = add(load_f32(x + 4 * i), shift)
        squares = fma(v, v, squares)
    result = total(squares)
    for i in range(whole, n):
        v = f32_at(x + 4 * i) - mean
        result += v * v
    return result


@numba.njit(error_model="numpy")
def _mean(x, n):
    sums = zeros()
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        sums = add(sums, load_f32(x + 4 * i))
    result = total(sums)
    for i in range(whole, n):
        result += f32_at(x + 4 * i)
    return result / F32(n)


@kernel("norm")
def norm(arguments, tile, thread):
    """Norm over each of `heads` parts of row `tile`."""
    out, out_stride, x, stride, weight, bias, n, heads, centred, eps, q, meta = unpack(arguments, "iiiiiiiiifii")
    whole = n // 16 * 16
    for head in range(heads):
        source, target = x + tile * stride + head * n * 4, out + tile * out_stride + head * n * 4
        mean = _mean(source, n) if centred else F32(0)
        factor = F32(1) / F32(math.sqrt(_sum_of_squares(source, mean, n) / F32(n) + F32(eps)))
        scale, shift = splat_f32(factor), splat_f32(-mean)
        for i in range(0, whole, 16):
            y = mul(mul(add(load_f32(source + 4 * i), shift), scale), load_f32(weight + 4 * i))
            if bias != 0:
                y = add(y, load_f32(bias + 4 * i))
            store_f32(target + 4 * i, y)
        for i in range(whole, n):
            y1 = (f32_at(source + 4 * i) - mean) * factor * f32_at(weight + 4 * i)
            if bias != 0:
                y1 += f32_at(bias + 4 * i)
            set_f32(target + 4 * i, y1)
    _maybe_quantize(out, out_stride, q, meta, tile, n * heads)


@numba.njit(error_model="numpy")
def tanh(v):
    """Through the exponential; exact to float32's rounding away from 0, absolute error 1e-7 near it."""
    two = splat_f32(F32(2))
    one = splat_f32(F32(1))
    return sub(one, div(two, add(exp(mul(two, v)), one)))


@numba.njit(error_model="numpy")
def _erf(v):
    """Error function, absolute error 1.5e-7. Source: Abramowitz and Stegun, 7.1.26."""
    x = absolute(v)
    one = splat_f32(F32(1))
    t = div(one, fma(splat_f32(F32(0.3275911)), x, one))
    p = splat_f32(F32(1.061405429))
    p = fma(p, t, splat_f32(F32(-1.453152027)))
    p = fma(p, t, splat_f32(F32(1.421413741)))
    p = fma(p, t, splat_f32(F32(-0.284496736)))
    p = mul(fma(p, t, splat_f32(F32(0.254829592))), t)
    y = sub(one, mul(p, exp(sub(zeros(), mul(x, x)))))
    # The sign of v: v / |v|, and 0 where v is 0, since y is 0 there too.
    return mul(y, div(v, maximum(x, splat_f32(F32(1e-30)))))


@numba.njit(error_model="numpy")
def activate(v, kind):
    """kind: 0 silu, 1 gelu by tanh, 2 gelu by erf, 3 relu."""
    one = splat_f32(F32(1))
    half = splat_f32(F32(0.5))
    if kind == 0:
        return div(v, add(one, exp(sub(zeros(), v))))
    if kind == 1:
        cube = mul(mul(v, v), v)
        inner = mul(splat_f32(F32(0.7978845608)), fma(splat_f32(F32(0.044715)), cube, v))
        return mul(mul(half, v), add(one, tanh(inner)))
    if kind == 2:
        return mul(mul(half, v), add(one, _erf(mul(v, splat_f32(F32(0.7071067812))))))
    return maximum(v, zeros())


@kernel("activation")
def activation(arguments, tile, thread):
    """Row `tile`: act(x), or act(first half) * second half. Buffers are padded to whole vectors."""
    out, out_stride, x, stride, n, kind, gated, q, meta = unpack(arguments, "iiiiiiiii")
    source, target = x + tile * stride, out + tile * out_stride
    for i in range(0, n, 16):
        y = activate(load_f32(source + 4 * i), kind)
        if gated:
            y = mul(y, load_f32(source + 4 * (n + i)))
        store_f32(target + 4 * i, y)
    _maybe_quantize(out, out_stride, q, meta, tile, n)


@kernel("add")
def add_rows(arguments, tile, thread):
    out, out_stride, x, x_stride, y, y_stride, n = unpack(arguments, "iiiiiii")
    for i in range(0, n, 16):
        v = add(load_f32(x + tile * x_stride + 4 * i), load_f32(y + tile * y_stride + 4 * i))
        store_f32(out + tile * out_stride + 4 * i, v)


@kernel("take")
def take(arguments, tile, thread):
    out, out_stride, x, stride, rows, n = unpack(arguments, "iiiiii")
    source = x + i32_at(rows + 4 * tile) * stride
    for i in range(0, n, 16):
        store_f32(out + tile * out_stride + 4 * i, load_f32(source + 4 * i))


@kernel("softcap")
def softcap(arguments, tile, thread):
    out, out_stride, x, stride, n, cap = unpack(arguments, "iiiiif")
    scale = splat_f32(F32(cap))
    for i in range(0, n, 16):
        v = load_f32(x + tile * stride + 4 * i)
        store_f32(out + tile * out_stride + 4 * i, mul(scale, tanh(div(v, scale))))
