"""Weights by inputs times a list of inputs of one token."""

from __future__ import annotations

import functools

import numba
import numpy as np

from cpu_kernels.atomics import atomic_add
from cpu_kernels.codes import FINE_GROUP, PLANE, SCALE, SUM, fine_at
from cpu_kernels.compile import Kernel, kernel, named, unpack
from cpu_kernels.finish import finish
from cpu_kernels.input_layout import InputLayout
from cpu_kernels.input_segments import float_segment, quantized_segment
from cpu_kernels.simd import (
    add,
    f32_at,
    i32_at,
    i64_at,
    load_f32,
    prefetch_l2,
    store_f32,
    zeros,
)
from cpu_kernels.table import count_of, group_of, neurons_of
from cpu_kernels.threads import first_tile

F32 = np.float32
PARTS = 16
"""A sum over the list is cut into so many parts, which are joined in order."""
COLUMN = 16
"""Wide segments that one piece of work should have: enough for a run of memory, few enough for many threads."""
AHEAD = 2
"""Entries ahead of their use at which weights are fetched: into the second-level cache, since rows whose distance is a
power of two would drive each other out of the first."""


@numba.njit(error_model="numpy")
def place_of(weight, places, size, table, groups, e):
    """An entry's weights and neurons, and of how many times four these are. size: of a group of weights."""
    group = weight + group_of(table, e) * 32 // size * places[5]
    return group, neurons_of(table, groups, e), (count_of(table, groups, e) + 3) // 4


@numba.njit(error_model="numpy")
def _coming(weight, places, size, table, groups, e, stop):
    """`place_of` an entry to be fetched; of nothing from `stop` on."""
    if e < stop:
        return place_of(weight, places, size, table, groups, e)
    return 0, 0, 0


@numba.njit(error_model="numpy")
def _fetch(address, nbytes):
    """Every line that any of these bytes is in."""
    for line in range(address & -64, address + nbytes, 64):
        prefetch_l2(line)


@functools.cache
def _fetching(layout: InputLayout):
    """Numba functions: fetch a column's scales and biases of a group of weights; fetch rows of some of its neurons."""
    wide_bytes, narrow_bytes = layout.segment_bytes(True), layout.segment_bytes(False)
    wide_outputs, narrow_outputs = layout.outputs(True), layout.outputs(False)
    number = layout.number_bytes if layout.bits else 0
    mask, symmetric = layout.group_size - 1, layout.symmetric

    @numba.njit(error_model="numpy")
    @named(layout.label)
    def fetch_numbers(group, places, column):
        first, last, tail = column
        start, count = first * wide_outputs, (last - first) * wide_outputs + tail * narrow_outputs
        _fetch(group + start * number, count * number)
        if not symmetric:
            _fetch(group + places[2] + start * number, count * number)

    @numba.njit(error_model="numpy")
    @named(layout.label)
    def fetch_rows(group, places, column, neurons, begin, end):
        wide, narrow, _, rows, narrow_rows, _ = places
        first, last, tail = column
        for i in range(begin, end):
            row = i32_at(neurons + 4 * i) & mask
            _fetch(group + rows + (row * wide + first) * wide_bytes, (last - first) * wide_bytes)
            _fetch(group + narrow_rows + row * narrow * narrow_bytes, tail * narrow_bytes)

    return fetch_numbers, fetch_rows


def _entry(layout: InputLayout, fine: bool = False):
    """Numba function: adds an entry's products to the sums of a column: wide segments first..last-1, and `tail` narrow.

    coming: the place of an entry whose weights are fetched meanwhile, some rows before each segment.
    """
    wide_segment, narrow_segment = (
        quantized_segment(layout, wide, fine) if layout.bits else float_segment(layout, wide) for wide in (True, False)
    )
    fetch_numbers, fetch_rows = _fetching(layout)
    wide_bytes, narrow_bytes = layout.segment_bytes(True), layout.segment_bytes(False)
    wide_outputs, narrow_outputs = layout.outputs(True), layout.outputs(False)
    number = layout.number_bytes if layout.bits else 0

    @numba.njit(error_model="numpy")
    @named(f"{layout.label}{' fine' if fine else ''}")
    def entry(sums, place, places, column, quads, second, d, start, both, coming):
        group, neurons, packs = place
        next_group, next_neurons, next_packs = coming
        wide, narrow, biases, rows, narrow_rows, _ = places
        first, last, tail = column
        segments, next_rows = last - first + tail, 4 * next_packs
        if next_packs > 0:
            fetch_numbers(next_group, places, column)
        each = (next_rows + segments - 1) // segments
        for i in range(segments):
            begin, index = i * each, first + i
            fetch_rows(next_group, places, column, next_neurons, begin, min(begin + each, next_rows))
            if index < last:
                scales, row = group + index * wide_outputs * number, group + rows + index * wide_bytes
                wide_segment(sums, scales, scales + biases, row, wide * wide_bytes, neurons, packs, quads, second, d,
                             start, both)  # fmt: skip
                sums += 4 * wide_outputs
            else:
                index -= last
                scales = group + (wide * wide_outputs + index * narrow_outputs) * number
                row = group + narrow_rows + index * narrow_bytes
                narrow_segment(sums, scales, scales + biases, row, narrow * narrow_bytes, neurons, packs, quads,
                               second, d, start, both)  # fmt: skip
                sums += 4 * narrow_outputs

    return entry


def _quantized_part(layout: InputLayout):
    """Numba function: sums of a column over entries begin..end-1 of a table; x is a panel of codes."""
    coarse_entry, fine_entry, size = _entry(layout), _entry(layout, True), layout.group_size

    @numba.njit(error_model="numpy")
    @named(layout.label)
    def part(sums, weight, places, column, table, groups, x, begin, end, stop):
        n = i32_at(table)
        fine = x + fine_at(32 * n, 1) + 64
        fine_end = fine + i64_at(fine - 64) * FINE_GROUP
        for e in range(begin, end):
            place = place_of(weight, places, size, table, groups, e)
            coming = _coming(weight, places, size, table, groups, e + AHEAD, stop)
            quads, number = x + 32 * e, x + 32 * n + 4 * e
            d, both, start = f32_at(number), f32_at(number + 4 * n), i32_at(number + 8 * n)
            while fine < fine_end and i32_at(fine) < e:
                fine += FINE_GROUP
            if fine < fine_end and i32_at(fine) == e:
                start = (start << 8) + i32_at(fine + SUM)
                step, second = f32_at(fine + SCALE), fine + PLANE
                fine_entry(sums, place, places, column, quads, second, step, start, both, coming)
            else:
                coarse_entry(sums, place, places, column, quads, 0, d, start, both, coming)

    return part


def _float_part(layout: InputLayout):
    """The same for floats; x is compact."""
    entry = _entry(layout)

    @numba.njit(error_model="numpy")
    @named(layout.label)
    def part(sums, weight, places, column, table, groups, x, begin, end, stop):
        for e in range(begin, end):
            place = place_of(weight, places, 32, table, groups, e)
            coming = _coming(weight, places, 32, table, groups, e + AHEAD, stop)
            entry(sums, place, places, column, x + 128 * e, 0, F32(0), 0, F32(0), coming)

    return part


@numba.njit(error_model="numpy")
def _joined(parts, part_bytes, n):
    """One vector of the sums of the parts that a list of n entries has."""
    y = zeros()
    for p in range(PARTS):
        if p * n // PARTS < (p + 1) * n // PARTS:
            y = add(y, load_f32(parts + p * part_bytes))
    return y


@numba.njit(error_model="numpy")
def _column(which, each, wide, narrow):
    """Of a column of `each` wide segments: the first, the one behind the last, and how many narrow ones follow."""
    last = min(which * each + each, wide)
    return which * each, last, narrow if last == wide else 0


@functools.cache
def fetch_inputs(layout: InputLayout) -> Kernel:
    """Kernel: asks for the entries that a thread starts with, as many as are fetched ahead later.

    Its arguments: weight, its `Places`, wide segments of a column, table, groups of all inputs, columns and threads.
    """
    fetch_numbers, fetch_rows = _fetching(layout)
    size = layout.group_size if layout.bits else 32

    @kernel(f"fetch inputs {layout.label}")
    def fetch_inputs(arguments, tile, thread):
        (weight, wide, narrow, biases, rows, narrow_rows, group_bytes, each, table, groups, columns,
         threads) = unpack(arguments, "iiiiiiiiiiii")  # fmt: skip
        places = wide, narrow, biases, rows, narrow_rows, group_bytes
        n, first = i32_at(table), first_tile(columns * PARTS, thread, threads)
        column = _column(first // PARTS, each, wide, narrow)
        begin = first % PARTS * n // PARTS
        for e in range(begin, min(begin + AHEAD, n)):
            group, neurons, packs = place_of(weight, places, size, table, groups, e)
            fetch_numbers(group, places, column)
            fetch_rows(group, places, column, neurons, 0, 4 * packs)

    return fetch_inputs


@functools.cache
def sparse_input_gemv(layout: InputLayout) -> Kernel:
    """Kernel: out = W x (+ bias) (+ residual) for one token, over the inputs of a table. Tile = column * PARTS + part.

    Args:
        layout: of the weights.

    Its arguments: out, rows of it in vectors, weight, its `Places`, wide segments of a column, table, groups of all
    inputs, x (a panel of codes, or compact floats) and bytes between those of threads, bytes of the sums of a part and
    memory for them, counters (a cache line for each column, at first zeros), bias and residual (0 for none), columns
    and threads.
    """
    part = _quantized_part(layout) if layout.bits else _float_part(layout)
    wide_outputs, narrow_outputs = layout.outputs(True), layout.outputs(False)

    @kernel(f"sparse inputs {layout.label}")
    def sparse_inputs(arguments, tile, thread):
        (out, vectors, weight, wide, narrow, biases, rows, narrow_rows, group_bytes, each, table, groups, x, x_each,
         part_bytes, parts, counters, bias, residual, columns,
         threads) = unpack(arguments, "iiiiiiiiiiiiiiiiiiiii")  # fmt: skip
        which, index = tile // PARTS, tile % PARTS
        n = i32_at(table)
        first, last, tail = _column(which, each, wide, narrow)
        nbytes = 4 * ((last - first) * wide_outputs + tail * narrow_outputs)
        begin, end = index * n // PARTS, (index + 1) * n // PARTS
        if begin < end:
            sums = parts + tile * part_bytes
            for i in range(0, nbytes, 64):
                store_f32(sums + i, zeros())
            places = wide, narrow, biases, rows, narrow_rows, group_bytes
            # What another thread will start with is not fetched here.
            after = first_tile(columns * PARTS, thread + 1, threads) - which * PARTS
            stop = after * n // PARTS if index < after < PARTS else n
            part(sums, weight, places, (first, last, tail), table, groups, x + thread * x_each, begin, end, stop)
        if atomic_add(counters + 64 * which, 1) % PARTS < PARTS - 1:
            return
        start = 4 * first * wide_outputs
        for i in range(0, min(nbytes, 64 * vectors - start), 64):
            y, at = _joined(parts + which * PARTS * part_bytes + i, part_bytes, n), start + i
            finish(y, out + at, bias + at if bias != 0 else 0, residual + at if residual != 0 else 0)

    return sparse_inputs
