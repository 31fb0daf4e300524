"""Activations as the products with quantized weights want them: int8, tokens side by side in panels.

A group of 32 inputs of a token is rounded to int8 with a scale of its own. That alone is what rounding costs others a
few per cent of their most likely tokens; nearly all of it comes from the few groups with an outlier. So these are
rounded finely: a second int8 plane holds what the first left over, in 1/256 of its steps. Whether a group is fine
depends on its row alone, so that a token's sums are the same in any company.

A panel holds `width` tokens of n inputs (G = n / 32 groups):

    [n/4][width] quads of the first plane, 4 bytes; if the width is 16: [G][width] runs of 32 bytes
    [G][width] scale d, float32
    [G][width] sum of both planes as a float32 number, which biases are multiplied by
    [G][width] sum of the first plane, negative, int32, then the same of the first 16 of 32 inputs
    its fine groups, by group and then token: their count (64 bytes), then for each 64 bytes: group and token, the scale
    d / 256, the sum of the second plane and that of its first 16 inputs, both negative (4 bytes each), and from byte 32
    that plane

A single token is a panel of width 1. The width of 16 is for Intel's tile instructions (AMX), to which a group's tokens
are the rows of a matrix.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from cpu_kernels import amx
from cpu_kernels.integer_dots import instruction_set
from cpu_kernels.simd import (
    absolute,
    add,
    f32_at,
    fma,
    largest,
    load_f32,
    maximum,
    mul,
    not_zero,
    round_to_i32,
    set_f32,
    set_i32,
    set_i64,
    splat_f32,
    store_i8,
    store_quads,
    sub,
    to_float,
    total,
    total_of_each,
    zeros,
)

F32 = np.float32
FINE = 4.0
"""A group is fine if its largest value exceeds this many times the root mean square of the row's values that are not 0,
so that a row's groups are fine or not however many were left out. Every sixth group of SmolLM2 is, and of the tokens
that one plane would change, two of three are kept."""
TILE = 16
"""Tokens of a panel for tile instructions."""
FINE_GROUP = 64
"""Bytes of a fine group."""
SCALE, SUM, HALF_SUM, PLANE = 8, 12, 16, 32
"""Where in a fine group its parts are."""


def panel_widths() -> tuple[int, ...]:
    """Tokens of a panel, the widest first: as many as there are registers for; the rest of a batch takes a narrower.

    Where there are tiles, vectors multiply that rest if it is half a tile's or less, in about the time of a tile.
    """
    if amx.tiles():
        return TILE, 8, 4
    return vector_widths()


def vector_widths() -> tuple[int, ...]:
    """The same for products by vectors alone."""
    return (12, 8, 4) if instruction_set() == "vnni512" else (4,)


def last_width(tokens: int) -> int:
    """Tokens of the last panel of so many: the fewest that hold what is left."""
    widths = panel_widths()
    rest = tokens % widths[0] or widths[0]
    return min(width for width in widths if width >= rest)


@numba.njit(error_model="numpy")
def panel_bytes(n, width):
    """Bytes of a panel."""
    return (n + n // 2 + n // 32 * FINE_GROUP) * width + 64


@numba.njit(error_model="numpy")
def fine_at(n, width):
    """Where in a panel its fine groups begin."""
    return (n + n // 2) * width


@numba.njit(error_model="numpy")
def _low(v):
    """At most 127: a remainder of exactly half a step would round to 128."""
    limit = splat_f32(F32(127))
    return sub(zeros(), maximum(sub(zeros(), v), sub(zeros(), limit)))


@numba.njit(error_model="numpy")
def root_mean_square(x, n):
    """Of those of n values that are not 0; NaN if any is NaN or infinite."""
    squares, poison, count = zeros(), zeros(), zeros()
    for i in range(0, n, 16):
        v = load_f32(x + 4 * i)
        squares = fma(v, v, squares)
        poison = fma(v, zeros(), poison)
        count = add(count, not_zero(v))
    return F32(math.sqrt(total(squares) / max(total(count), F32(1)))) + total(poison)


@numba.njit(error_model="numpy")
def quantize_group(x, rms, panel, n, width, token, group, fine):
    """Rounds 32 floats of a row with some root mean square. Returns where the next fine group goes."""
    v0, v1 = load_f32(x), load_f32(x + 64)
    peak = largest(maximum(absolute(v0), absolute(v1)))
    d = peak / F32(127)
    if math.isnan(rms):
        d = rms
    inverse = F32(127) / peak if peak > F32(1e-30) else F32(0)
    step = splat_f32(inverse)
    h0, h1 = round_to_i32(mul(v0, step)), round_to_i32(mul(v1, step))
    plane = panel + group * 32 * width
    if width == TILE:
        store_i8(plane + 32 * token, h0)
        store_i8(plane + 32 * token + 16, h1)
    else:
        store_quads(plane + 4 * token, 4 * width, h0)
        store_quads(plane + 4 * token + 16 * width, 4 * width, h1)
    sums = total_of_each(h0, h1)
    half = sums << 32 >> 32
    high = half + (sums >> 32)
    both = F32(high) * d
    if peak > F32(FINE) * rms:
        back, small = splat_f32(-d), splat_f32(inverse * F32(256))
        l0 = round_to_i32(_low(mul(fma(to_float(h0), back, v0), small)))
        l1 = round_to_i32(_low(mul(fma(to_float(h1), back, v1), small)))
        sums = total_of_each(l0, l1)
        low = (sums << 32 >> 32) + (sums >> 32)
        set_i32(fine, group)
        set_i32(fine + 4, token)
        set_f32(fine + SCALE, d / F32(256))
        set_i32(fine + SUM, -low)
        set_i32(fine + HALF_SUM, -(sums << 32 >> 32))
        store_i8(fine + PLANE, l0)
        store_i8(fine + PLANE + 16, l1)
        both += F32(low) * (d / F32(256))
        fine += FINE_GROUP
    block = width * n // 8
    number = panel + n * width + 4 * (group * width + token)
    set_f32(number, d)
    set_f32(number + block, both)
    set_i32(number + 2 * block, -high)
    set_i32(number + 3 * block, -half)
    return fine


@numba.njit(error_model="numpy")
def quantize_rows(x, stride, count, panel, n, width):
    """Rounds `count` rows of n floats (a multiple of 32), `stride` bytes apart, into a panel; the rest of it is zeros.

    A group of zeros gives zeros; NaN or infinity anywhere makes a row's scales NaN, so that it is not lost.
    """
    first = panel + fine_at(n, width)
    if n == 0:
        set_i64(first, 0)
        return
    fine = first + 64
    for token in range(count):
        # Kept where the row's last number will be, which is written last.
        set_f32(panel + n * width + n // 2 * width - 4 * (width - token), root_mean_square(x + token * stride, n))
    for group in range(n // 32):
        for token in range(count):
            rms = f32_at(panel + n * width + n // 2 * width - 4 * (width - token))
            at = x + token * stride + group * 128
            fine = quantize_group(at, rms, panel, n, width, token, group, fine)
    set_i64(first, (fine - first) // FINE_GROUP - 1)
    for token in range(count, width):
        clear_token(panel, n, width, token)


@numba.njit(error_model="numpy")
def clear_token(panel, n, width, token):
    """Zeros for a token of a panel that there is none for."""
    for quad in range(n // 4):
        place = quad // 8 * 8 * width + 8 * token + quad % 8 if width == TILE else quad * width + token
        set_i32(panel + 4 * place, 0)
    for number in range(n // 4, n // 4 + n // 8):
        set_i32(panel + 4 * (number * width + token), 0)
