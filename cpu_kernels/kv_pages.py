"""Storing keys and values in the pages of the cache."""

from __future__ import annotations

import numpy as np

from cpu_kernels.compile import kernel, unpack
from cpu_kernels.rope import rotate
from cpu_kernels.simd import f32_at, i32_at, load_f32, set_f16, spread_f16, store_f16

F32 = np.float32


@kernel("append")
def append(arguments, tile, thread):
    """Keys, rotated if there is a table, and values of token `tile` to their page, in float16.

    Page of one KV head: keys as 4 blocks of 16 positions, [dimension][16 positions]; values as [64 positions][padded].
    """
    (k, k_stride, v, v_stride, positions, slots, block_table, per_slot, keys, values, page_bytes, heads, head_dim,
     padded, rotation, half, scratch, scratch_each) = unpack(arguments, "iiiiiiiiiiiiiiiiii")  # fmt: skip
    position, slot = i32_at(positions + 4 * tile), i32_at(slots + 4 * tile)
    page = i32_at(block_table + 4 * (slot * per_slot + position // 64))
    inside, whole = position % 64, head_dim // 16 * 16
    for head in range(heads):
        base = (page * heads + head) * page_bytes
        k_to = keys + base + inside // 16 * padded * 32 + inside % 16 * 2
        v_to = values + base + inside * padded * 2
        k_from, v_from = k + tile * k_stride + head * head_dim * 4, v + tile * v_stride + head * head_dim * 4
        if rotation != 0:
            rotated = scratch + thread * scratch_each
            rotate(rotated, k_from, rotation + position * half * 8, head_dim, half)
            k_from = rotated
        for i in range(0, whole, 16):
            spread_f16(k_to + 32 * i, load_f32(k_from + 4 * i))
            store_f16(v_to + 2 * i, load_f32(v_from + 4 * i))
        for i in range(whole, head_dim):
            set_f16(k_to + 32 * i, f32_at(k_from + 4 * i))
        for i in range(whole, padded):
            set_f16(v_to + 2 * i, f32_at(v_from + 4 * i) if i < head_dim else F32(0))
