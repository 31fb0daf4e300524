"""A token's int8 codes in the order of `row_layout`: lane = group.

They are made from a panel of width 1 (see `codes`). Each segment of a row has SEGMENT bytes:

    8 vectors of the first plane, 8 of the second (m / 2 of them used)
    16 scales, float32, each in all lanes of its group; d / 256 if the segment has a fine group
    16 sums of both planes, float32, which biases are multiplied by
    16 sums of the first plane, negative, int32, then the same of the second
    whether the segment has a fine group, int32

Sums stand in one lane of their group only; other lanes, and what belongs to no group, are zero. Where there is a fine
group, all groups of the segment are computed in steps of d / 256: 256 times the sum over the first plane, plus that over
the second, which is zero for groups that are not fine.
"""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels.codes import FINE_GROUP, PLANE, SUM, fine_at
from cpu_kernels.compile import call_kernel, kernel, unpack
from cpu_kernels.row_layout import segments
from cpu_kernels.simd import f32_at, i32_at, i64_at, set_f32, set_i32, store_f32, zeros

SECOND, SCALES, SUMS, STARTS, SECOND_STARTS, FINE, SEGMENT = 512, 1024, 1088, 1152, 1216, 1280, 1344
"""Where in a segment its parts are, and its size."""


def row_codes_bytes(inputs: int) -> int:
    """Bytes of a token's codes."""
    return len(segments(inputs)) * SEGMENT


@numba.njit(error_model="numpy")
def _segment(group, groups):
    """The segment that a group is in: its number, its first group and how many groups it has."""
    number, first = group // 16, group // 16 * 16
    m = 16
    while first + m > groups + groups % 2:
        m //= 2
        if first + m <= group and first + m <= groups:
            first += m
            number += 1
    return number, first, m


@numba.njit(error_model="numpy")
def _place(plane, source, lane, m):
    """32 codes of a group into a segment's plane."""
    half = m // 2
    for quad in range(8):
        set_i32(plane + quad % half * 64 + 4 * (lane + quad // half * m), i32_at(source + 4 * quad))


@numba.njit(error_model="numpy")
def reorder(panel, out, inputs):
    """A panel of width 1 to a token's codes by segment."""
    groups = inputs // 32
    count, _, _ = _segment(groups - 1, groups)
    for at in range(0, (count + 1) * SEGMENT, 64):
        store_f32(out + at, zeros())
    numbers = panel + inputs
    for group in range(groups):
        number, first, m = _segment(group, groups)
        here, lane = out + number * SEGMENT, group - first
        _place(here, panel + 32 * group, lane, m)
        scale = f32_at(numbers + 4 * group)
        for i in range(lane, 16, m):
            set_f32(here + SCALES + 4 * i, scale)
        set_f32(here + SUMS + 4 * lane, f32_at(numbers + 4 * (groups + group)))
        set_i32(here + STARTS + 4 * lane, i32_at(numbers + 4 * (2 * groups + group)))
    fine = panel + fine_at(inputs, 1)
    for i in range(i64_at(fine)):
        _add_fine(fine + 64 + i * FINE_GROUP, out, groups)


@numba.njit(error_model="numpy")
def _add_fine(entry, out, groups):
    """The second plane of a group."""
    number, first, m = _segment(i32_at(entry), groups)
    here, lane = out + number * SEGMENT, i32_at(entry) - first
    _place(here + SECOND, entry + PLANE, lane, m)
    set_i32(here + SECOND_STARTS + 4 * lane, i32_at(entry + SUM))
    if i32_at(here + FINE) == 0:
        set_i32(here + FINE, 1)
        for at in range(here + SCALES, here + SUMS, 4):
            set_f32(at, f32_at(at) / np.float32(256))


@kernel("row codes")
def row_codes(arguments, tile, thread):
    """A thread's own codes of a token: runs what makes its panel, whose arguments follow, then reorders that."""
    maker, panel, panel_bytes, out, out_bytes, inputs = unpack(arguments, "iiiiii")
    call_kernel(maker, arguments + 48, tile, thread)
    reorder(panel + thread * panel_bytes, out + thread * out_bytes, inputs)
