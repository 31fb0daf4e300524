"""Rotary position embedding, and the storing of keys and values."""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels.compile import kernel, unpack
from cpu_kernels.simd import (
    add,
    f32_at,
    fma,
    i32_at,
    load_f32,
    mul,
    set_f16,
    set_f32,
    store_f16,
    store_f32,
    sub,
    zeros,
)

F32 = np.float32


@numba.njit(error_model="numpy")
def _rotate(out, x, cos, sin, half):
    """One head: pair i is dimensions i and half + i."""
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


@kernel("rope")
def rope(arguments, tile, thread):
    """Heads of token `tile`. The table holds, per position, `half` cosines and `half` sines."""
    out, out_stride, x, stride, positions, table, heads, head_dim, half = unpack(arguments, "iiiiiiiii")
    cos = table + i32_at(positions + 4 * tile) * half * 8
    sin = cos + half * 4
    for head in range(heads):
        source, target = (
            x + tile * stride + head * head_dim * 4,
            out + tile * out_stride + head * head_dim * 4,
        )
        _rotate(target, source, cos, sin, half)
        for i in range(2 * half, head_dim):
            set_f32(target + 4 * i, f32_at(source + 4 * i))


@kernel("append")
def append(arguments, tile, thread):
    """Keys and values of token `tile` to their page, in float16.

    Page of one KV head: keys as 4 blocks of 16 positions, [dimension][16 positions]; values as [64 positions][padded].
    """
    (k, k_stride, v, v_stride, positions, slots, block_table, per_slot, keys, values, page_bytes, heads, head_dim,
     padded) = unpack(arguments, "iiiiiiiiiiiiii")  # fmt: skip
    position, slot = i32_at(positions + 4 * tile), i32_at(slots + 4 * tile)
    page = i32_at(block_table + 4 * (slot * per_slot + position // 64))
    inside = position % 64
    for head in range(heads):
        base = (page * heads + head) * page_bytes
        k_to = keys + base + inside // 16 * padded * 32 + inside % 16 * 2
        v_to = values + base + inside * padded * 2
        k_from, v_from = k + tile * k_stride + head * head_dim * 4, v + tile * v_stride + head * head_dim * 4
        for i in range(head_dim):
            set_f16(k_to + 32 * i, f32_at(k_from + 4 * i))
        whole = head_dim // 16 * 16
        for i in range(0, whole, 16):
            store_f16(v_to + 2 * i, load_f32(v_from + 4 * i))
        for i in range(whole, padded):
            set_f16(v_to + 2 * i, f32_at(v_from + 4 * i) if i < head_dim else F32(0))


@numba.njit(error_model="numpy")
def scaled_query(out, q, head_dim, scale):
    """One head's query times the score scale."""
    for i in range(head_dim):
        set_f32(out + 4 * i, f32_at(q + 4 * i) * scale)


@numba.njit(error_model="numpy")
def add_scaled(out, x, weight, n):
    """out = out + weight * x over n floats, n a multiple of 16; weight is a vector."""
    for i in range(0, n, 16):
        store_f32(out + 4 * i, add(load_f32(out + 4 * i), mul(weight, load_f32(x + 4 * i))))
