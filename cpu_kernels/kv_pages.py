"""Storing keys and values in the pages of the cache."""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels.compile import kernel, unpack
from cpu_kernels.rope import rotate
from cpu_kernels.simd import f32_at, i32_at, load_f32, set_f16, spread_f16, store_f16

F32 = np.float32


@numba.njit(error_model="numpy")
def _store_column(to, x, n):
    """n values as one lane of rows of 16 positions."""
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        spread_f16(to + 32 * i, load_f32(x + 4 * i))
    for i in range(whole, n):
        set_f16(to + 32 * i, f32_at(x + 4 * i))


@numba.njit(error_model="numpy")
def _store_row(to, x, n, padded):
    """n values and zeros behind them."""
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        store_f16(to + 2 * i, load_f32(x + 4 * i))
    for i in range(whole, padded):
        set_f16(to + 2 * i, f32_at(x + 4 * i) if i < n else F32(0))


@kernel("append")
def append(arguments, tile, thread):
    """Keys, rotated if there is a table, and values of token `tile` to their page, in float16.

    Page of one KV head: keys as 4 blocks of 16 positions, [dimension][16 positions]; values as [64 positions][padded].
    """
    (k, k_stride, v, v_stride, positions, slots, block_table, per_slot, keys, values, page_bytes, heads, head_dim,
     padded, rotation, half, scratch, scratch_each) = unpack(arguments, "iiiiiiiiiiiiiiiiii")  # fmt: skip
    position, slot = i32_at(positions + 4 * tile), i32_at(slots + 4 * tile)
    page = i32_at(block_table + 4 * (slot * per_slot + position // 64))
    inside = position % 64
    for head in range(heads):
        base = (page * heads + head) * page_bytes
        k_from, v_from = k + tile * k_stride + head * head_dim * 4, v + tile * v_stride + head * head_dim * 4
        if rotation != 0:
            rotated = scratch + thread * scratch_each
            rotate(rotated, k_from, rotation + position * half * 8, head_dim, half)
            k_from = rotated
        _store_column(keys + base + inside // 16 * padded * 32 + inside % 16 * 2, k_from, head_dim)
        _store_row(values + base + inside * padded * 2, v_from, head_dim, padded)


@kernel("append in parts")
def append_parts(arguments, tile, thread):
    """Keys in two parts and values of token `tile` to their page, in float16.

    Page of one KV head: the first `part` dimensions of keys as 4 blocks of 16 positions, [dimension][16 positions];
    their other dimensions as [64 positions][padded]; values as [64 positions][padded].
    """
    (k, k_stride, v, v_stride, positions, slots, block_table, per_slot, firsts, rests, values, heads, head_dim,
     part) = unpack(arguments, "iiiiiiiiiiiiii")  # fmt: skip
    position, slot = i32_at(positions + 4 * tile), i32_at(slots + 4 * tile)
    page = i32_at(block_table + 4 * (slot * per_slot + position // 64))
    first, rest, padded = (part + 15) // 16 * 16, (head_dim - part + 15) // 16 * 16, (head_dim + 15) // 16 * 16
    for head in range(heads):
        row = (page * heads + head) * 64 + position % 64
        k_from, v_from = k + tile * k_stride + head * head_dim * 4, v + tile * v_stride + head * head_dim * 4
        _store_column(firsts + row // 16 * first * 32 + row % 16 * 2, k_from, part)
        _store_row(rests + row * rest * 2, k_from + 4 * part, head_dim - part, rest)
        _store_row(values + row * padded * 2, v_from, head_dim, padded)
