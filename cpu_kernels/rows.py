"""Operations on rows of activations: norms, activation functions, masks and sums."""

from __future__ import annotations

import math

import numba
import numpy as np

from cpu_kernels.codes import panel_bytes, quantize_rows
from cpu_kernels.compile import kernel, unpack
from cpu_kernels.exponential import exp
from cpu_kernels.simd import (
    absolute,
    add,
    div,
    f32_at,
    fma,
    i32_at,
    i64_at,
    load_f32,
    maximum,
    mul,
    set_f32,
    splat_f32,
    store_f32,
    sub,
    total,
    zeros,
)

F32 = np.float32


# Kernels whose results are inputs of linears make either floats (`panels` is 0; tile `tile` is a row, `out` all rows),
# or int8 codes by way of floats (the tile is a panel of `width` rows, see `codes`; `out` is memory for one). Bytes
# between the copies of threads belong to both.


@numba.njit(error_model="numpy")
def _rows_of(tile, width, n_rows):
    """First row of a tile, and the row after its last."""
    return tile * width, min(tile * width + width, n_rows)


@numba.njit(error_model="numpy")
def _place(out, stride, each, thread, row, first, panels):
    return out + thread * each + (row if panels == 0 else row - first) * stride


@numba.njit(error_model="numpy")
def _encode(x, stride, first, last, panels, each, thread, tile, width, last_width, n_rows, n):
    """Rows first..last-1, the first of them at x, into their panel."""
    if panels != 0:
        panel = panels + thread * each + tile * panel_bytes(n, width)
        quantize_rows(x, stride, last - first, panel, n, last_width if last == n_rows else width)


@kernel("quantize")
def quantize(arguments, tile, thread):
    """Rows as they are, to codes."""
    _out, _out_stride, _out_each, x, stride, n, panels, each, width, last_width, n_rows = unpack(
        arguments, "iiiiiiiiiii"
    )
    first, last = _rows_of(tile, width, n_rows)
    _encode(x + first * stride, stride, first, last, panels, each, thread, tile, width, last_width, n_rows, n)


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


@numba.njit(error_model="numpy")
def _norm_row(target, source, weight, bias, n, centred, eps):
    whole = n // 16 * 16
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


@kernel("norm")
def norm(arguments, tile, thread):
    """Norm over each of `heads` parts of a row."""
    (out, out_stride, out_each, x, stride, weight, bias, n, heads, centred, eps, panels, each, width, last_width,
     n_rows) = unpack(arguments, "iiiiiiiiiifiiiii")  # fmt: skip
    first, last = _rows_of(tile, width, n_rows)
    for row in range(first, last):
        target = _place(out, out_stride, out_each, thread, row, first, panels)
        for head in range(heads):
            part = head * n * 4
            _norm_row(target + part, x + row * stride + part, weight, bias, n, centred, eps)
    own, n = out + thread * out_each, n * heads
    _encode(own, out_stride, first, last, panels, each, thread, tile, width, last_width, n_rows, n)


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
    """kind: 0 silu, 1 gelu by tanh, 2 gelu by erf, 3 relu, 4 the absolute value, 5 the value itself."""
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
    if kind == 3:
        return maximum(v, zeros())
    if kind == 5:
        return v
    return absolute(v)


@kernel("activation")
def activation(arguments, tile, thread):
    """act(x), or act(first half) * second half. Buffers are padded to whole vectors."""
    out, out_stride, out_each, x, stride, n, kind, gated, panels, each, width, last_width, n_rows = unpack(
        arguments, "iiiiiiiiiiiii"
    )
    first, last = _rows_of(tile, width, n_rows)
    for row in range(first, last):
        source, target = x + row * stride, _place(out, out_stride, out_each, thread, row, first, panels)
        for i in range(0, n, 16):
            y = activate(load_f32(source + 4 * i), kind)
            if gated:
                y = mul(y, load_f32(source + 4 * (n + i)))
            store_f32(target + 4 * i, y)
    own = out + thread * out_each
    _encode(own, out_stride, first, last, panels, each, thread, tile, width, last_width, n_rows, n)


@numba.njit(error_model="numpy")
def _clear(row, n, mask, block):
    """Sets values to 0 whose unit of `block` values has no bit."""
    for unit in range(-(-n // block)):
        chosen = i64_at(mask + unit // 64 * 8) >> unit % 64 & 1
        for i in range(unit * block, min((unit + 1) * block, n)):
            # No branch: half of the guesses would be wrong.
            set_f32(row + 4 * i, f32_at(row + 4 * i) if chosen else F32(0))


@kernel("mask")
def mask(arguments, tile, thread):
    """x, or x * values, where the bit of a value's unit is set, else 0. Buffers are padded to whole vectors."""
    (out, out_stride, out_each, x, stride, n, bits, bits_stride, block, values, values_stride, panels, each, width,
     last_width, n_rows) = unpack(arguments, "iiiiiiiiiiiiiiii")  # fmt: skip
    first, last = _rows_of(tile, width, n_rows)
    for row in range(first, last):
        source, target = x + row * stride, _place(out, out_stride, out_each, thread, row, first, panels)
        for i in range(0, n, 16):
            y = load_f32(source + 4 * i)
            if values != 0:
                y = mul(y, load_f32(values + row * values_stride + 4 * i))
            store_f32(target + 4 * i, y)
        _clear(target, n, bits + row * bits_stride, block)
    own = out + thread * out_each
    _encode(own, out_stride, first, last, panels, each, thread, tile, width, last_width, n_rows, n)


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
