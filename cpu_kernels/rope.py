"""Rotary position embedding."""

from __future__ import annotations

import numba

from cpu_kernels.compile import kernel, unpack
from cpu_kernels.simd import f32_at, fma, i32_at, load_f32, mul, set_f32, store_f32, sub, zeros


@numba.njit(error_model="numpy")
def rotate(out, x, angles, head_dim, half):
    """One head: pair i is dimensions i and half + i. angles: `half` cosines, then `half` sines."""
    cos, sin = angles, angles + half * 4
    whole = half // 16 * 16
    for i in range(0, whole, 16):
        a, b = load_f32(x + 4 * i), load_f32(x + 4 * (half + i))
        c, s = load_f32(cos + 4 * i), load_f32(sin + 4 * i)
        store_f32(out + 4 * i, fma(a, c, sub(zeros(), mul(b, s))))
        store_f32(out + 4 * (half + i), fma(a, s, mul(b, c)))
    for i in range(whole, half):
        a1, b1 = f32_at(x + 4 * i), f32_at(x + 4 * (half + i))
        c1, s1 = f32_at(cos + 4 * i), f32_at(sin + 4 * i)
        set_f32(out + 4 * i, a1 * c1 - b1 * s1)
        set_f32(out + 4 * (half + i), a1 * s1 + b1 * c1)
    for i in range(2 * half, head_dim):
        set_f32(out + 4 * i, f32_at(x + 4 * i))


@kernel("rope")
def rope(arguments, tile, thread):
    """Heads of token `tile`. The table holds, per position, `half` cosines and `half` sines."""
    out, out_stride, _out_each, x, stride, positions, table, heads, head_dim, half = unpack(arguments, "iiiiiiiiii")
    angles = table + i32_at(positions + 4 * tile) * half * 8
    for head in range(heads):
        first = head * head_dim * 4
        rotate(out + tile * out_stride + first, x + tile * stride + first, angles, head_dim, half)
