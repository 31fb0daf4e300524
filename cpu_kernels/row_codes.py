"""A token's int8 codes in the order of `row_layout`: lane = group.

They are made from a panel of width 1 (see `codes`): first whole segments, which all rows of a neuron share, then those
of what is left, which hold the same groups once for each row. A segment has SEGMENT bytes:

    8 vectors of the first plane, 8 of the second (m / 2 of them used)
    16 scales, float32, each in all lanes of its group; d / 256 if the segment has a fine group
    16 sums of both planes, float32, which biases are multiplied by
    16 numbers to start the sums over the first plane from, int32, then the same for the second: 0, or for symmetric
    weights the middle code times the negative sum of the plane
    whether the segment has a fine group, int32

Sums stand in one lane of their group only; other lanes, and what belongs to no group, are zero. Where there is a fine
group, all groups of the segment are computed in steps of d / 256: 256 times the sum over the first plane, plus that
over the second, which is zero for groups that are not fine.
"""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels.codes import FINE_GROUP, PLANE, SUM, fine_at
from cpu_kernels.compile import call_kernel, kernel, unpack
from cpu_kernels.row_layout import RowLayout
from cpu_kernels.simd import f32_at, i32_at, i64_at, load_f32, set_f32, set_i32, store_f32, zeros

SECOND, SCALES, SUMS, STARTS, SECOND_STARTS, FINE, SEGMENT = 512, 1024, 1088, 1152, 1216, 1280, 1344
"""Where in a segment its parts are, and its size."""


def row_codes_bytes(layout: RowLayout) -> int:
    """Bytes of a token's codes."""
    return (layout.n_whole + len(layout.rest)) * SEGMENT


@numba.njit(error_model="numpy")
def _rest_segment(place, count):
    """The segment in which a place among the `count` groups left is: its number, first place and log2(groups / 2)."""
    number, first, shift = 0, 0, 3
    while True:
        while 2 << shift > count + (count & 1) - first:
            shift -= 1
        if place < first + (2 << shift):
            return number, first, shift
        first += 2 << shift
        number += 1


@numba.njit(error_model="numpy")
def _place(plane, source, lane, shift):
    """32 codes of a group into a plane."""
    for quad in range(8):
        vector, turn = quad & ((1 << shift) - 1), quad >> shift
        set_i32(plane + 64 * vector + 4 * (lane + (turn << (shift + 1))), i32_at(source + 4 * quad))


@numba.njit(error_model="numpy")
def _clear(out, end):
    for at in range(out, end, 64):
        store_f32(at, zeros())


@numba.njit(error_model="numpy")
def _whole_segment(out, panel, numbers, first, groups, middle):
    """16 groups, from `first` on."""
    for lane in range(16):
        _place(out, panel + 32 * (first + lane), lane, 3)
        set_i32(out + STARTS + 4 * lane, middle * i32_at(numbers + 4 * (2 * groups + first + lane)))
    store_f32(out + SCALES, load_f32(numbers + 4 * first))
    store_f32(out + SUMS, load_f32(numbers + 4 * (groups + first)))
    set_i32(out + FINE, 0)


@numba.njit(error_model="numpy")
def _rest_group(out, panel, numbers, group, groups, lane, shift, middle):
    """One group of a segment of what is left."""
    _place(out, panel + 32 * group, lane, shift)
    for i in range(lane, 16, 2 << shift):
        set_f32(out + SCALES + 4 * i, f32_at(numbers + 4 * group))
    set_f32(out + SUMS + 4 * lane, f32_at(numbers + 4 * (groups + group)))
    set_i32(out + STARTS + 4 * lane, middle * i32_at(numbers + 4 * (2 * groups + group)))


@numba.njit(error_model="numpy")
def _add_fine(out, entry, lane, shift, middle):
    """The second plane of a group."""
    if i32_at(out + FINE) == 0:
        set_i32(out + FINE, 1)
        _clear(out + SECOND, out + SCALES)
        _clear(out + SECOND_STARTS, out + FINE)
        for at in range(out + SCALES, out + SUMS, 4):
            set_f32(at, f32_at(at) / np.float32(256))
    _place(out + SECOND, entry + PLANE, lane, shift)
    set_i32(out + SECOND_STARTS + 4 * lane, middle * i32_at(entry + SUM))


@numba.njit(error_model="numpy")
def reorder(panel, out, inputs, parts, middle):
    """A panel of width 1 to a token's codes by segment. middle: of symmetric codes, else 0."""
    groups, whole, numbers = inputs // 32, inputs // 512 * 16, panel + inputs
    rest, tail = groups - whole, out + whole // 16 * SEGMENT
    for first in range(0, whole, 16):
        _whole_segment(out + first // 16 * SEGMENT, panel, numbers, first, groups, middle)
    for place in range(rest * parts):
        number, first, shift = _rest_segment(place, rest * parts)
        here = tail + number * SEGMENT
        if place == first:
            _clear(here, here + SEGMENT)
        _rest_group(here, panel, numbers, whole + place % rest, groups, place - first, shift, middle)
    fine = panel + fine_at(inputs, 1)
    for i in range(i64_at(fine)):
        entry = fine + 64 + i * FINE_GROUP
        group = i32_at(entry)
        if group < whole:
            _add_fine(out + group // 16 * SEGMENT, entry, group % 16, 3, middle)
        for part in range(parts if group >= whole else 0):
            place = part * rest + group - whole
            number, first, shift = _rest_segment(place, rest * parts)
            _add_fine(tail + number * SEGMENT, entry, place - first, shift, middle)


@kernel("row codes")
def row_codes(arguments, tile, thread):
    """A thread's own codes of a token: runs what makes its panel, whose arguments follow, then reorders that."""
    maker, panel, panel_bytes, out, out_bytes, inputs, parts, middle = unpack(arguments, "iiiiiiii")
    call_kernel(maker, arguments + 64, tile, thread)
    reorder(panel + thread * panel_bytes, out + thread * out_bytes, inputs, parts, middle)
