"""Which heads of attention a token asked for, and zeros for the others.

A mask has a bit for each unit: [rows][words] uint64, rows one per token, or one for all. A unit is a query head, or the
query heads of one KV head. The address 0 stands for every head.
"""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels.simd import i64_at, set_f32, store_f32, zeros


@numba.njit(error_model="numpy")
def chosen(masks, mask_stride, unit, token, head):
    """Whether a token asked for a query head.

    Args:
        masks, mask_stride: address of the masks, and bytes between two tokens'; 0 where they share one.
        unit: query heads of one bit.
    """
    bit = head // unit
    return masks == 0 or (i64_at(masks + token * mask_stride + bit // 64 * 8) >> bit % 64) & 1 != 0


@numba.njit(error_model="numpy")
def any_chosen(masks, mask_stride, unit, token, tokens, head, heads):
    """Whether any of some tokens asked for any of some query heads."""
    for t in range(token, token + tokens):
        for h in range(head, head + heads):
            if chosen(masks, mask_stride, unit, t, h):
                return True
    return False


@numba.njit(error_model="numpy")
def clear(out, n):
    """Zeros n values."""
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        store_f32(out + 4 * i, zeros())
    for i in range(whole, n):
        set_f32(out + 4 * i, np.float32(0))
