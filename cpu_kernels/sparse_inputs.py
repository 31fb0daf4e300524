"""Weights by inputs times a list of inputs of one token."""

from __future__ import annotations

import functools

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.codes import FINE_GROUP, PLANE, SCALE, SUM, fine_at
from cpu_kernels.compile import Kernel, kernel, named, unpack
from cpu_kernels.finish import finish
from cpu_kernels.float_linear import LOADS
from cpu_kernels.input_layout import InputLayout, interleaved, load_segment
from cpu_kernels.integer_dots import integer_dots
from cpu_kernels.simd import (
    I64,
    add,
    atomic_add,
    atomic_store,
    f32_at,
    i32_at,
    i64_at,
    load_f32,
    offset,
    store_f32,
    zeros,
)
from cpu_kernels.table import count_of, group_of, neurons_of

F32 = np.float32
PARTS = 16
"""A sum over the list is cut into so many parts, which are joined in order."""
COLUMN = 8
"""Wide segments that one piece of work should have: enough for a run of memory, few enough for many threads."""


def row_at(b, layout, base, row_bytes, neuron):
    """Address of a neuron's row, given that of its group's first and where the neuron's number is."""
    row = b.and_(simd.i32_at.build(b, neuron), I64(layout.group_size - 1))
    return b.add(base, b.mul(row, row_bytes))


def _quantized_segment(layout: InputLayout, wide: bool):
    """Intrinsic: adds an entry's products for a segment of outputs to their sums."""
    load_number = simd.load_f16 if layout.kind == "f16" else simd.load_f32

    @intrinsic
    def segment(context, sums, scales, biases, base, row_bytes, neurons, packs, quads, d, start, both):
        def codegen(ctx, b, signature, args):
            sums, scales, biases, base, row_bytes, neurons, packs, quads, d, start, both = args
            middle = b.shl(simd.splat(b, b.trunc(start, simd.I32)), simd.ints(layout.bits - 1))
            first = middle if layout.symmetric else simd.ints(0)
            products = [cgutils.alloca_once_value(b, first) for _ in range(layout.outputs(wide) // 16)]
            with cgutils.for_range(b, packs) as loop:
                pack = b.mul(loop.index, I64(16))
                places = [offset(b, b.add(neurons, pack), 4 * r) for r in range(4)]
                rows = [load_segment(b, row_at(b, layout, base, row_bytes, at), wide) for at in places]
                quad = simd.splat_quad.build(b, b.add(quads, b.mul(loop.index, I64(4))))
                for product, codes in zip(products, _codes(b, layout, interleaved(b, rows))):
                    b.store(integer_dots(b, b.load(product), [codes], [quad], layout.bits), product)
            step, factor = simd.splat(b, d), simd.splat(b, both)
            for i, product in enumerate(products):
                at, skip = offset(b, sums, 64 * i), 16 * layout.number_bytes * i
                value = b.fmul(simd.to_float.build(b, b.load(product)), step)
                rows_scales = load_number.build(b, offset(b, scales, skip))
                total = simd.fma.build(b, value, rows_scales, simd.load_f32.build(b, at))
                if not layout.symmetric:
                    total = simd.fma.build(b, load_number.build(b, offset(b, biases, skip)), factor, total)
                simd.store_f32.build(b, at, total)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 8, types.float32, types.int64, types.float32), codegen

    return segment


def _codes(b, layout, vectors):
    """Codes of all outputs of a segment, in their order."""
    if layout.bits == 8:
        return vectors
    return [simd.low_nibbles.build(b, v) for v in vectors] + [simd.high_nibbles.build(b, v) for v in vectors]


def _float_segment(layout: InputLayout, wide: bool):
    """The same of floats; `quads` is where the inputs are."""
    load, size = LOADS[layout.kind]

    @intrinsic
    def segment(context, sums, scales, biases, base, row_bytes, neurons, packs, quads, d, start, both):
        def codegen(ctx, b, signature, args):
            sums, _, _, base, row_bytes, neurons, packs, inputs, *_ = args
            places = [offset(b, sums, 64 * i) for i in range(layout.outputs(wide) // 16)]
            totals = [cgutils.alloca_once_value(b, simd.load_f32.build(b, at)) for at in places]
            with cgutils.for_range(b, packs) as loop:
                pack = b.mul(loop.index, I64(16))
                for r in range(4):
                    row = row_at(b, layout, base, row_bytes, offset(b, b.add(neurons, pack), 4 * r))
                    x = simd.splat_f32_at.build(b, offset(b, b.add(inputs, pack), 4 * r))
                    for i, total in enumerate(totals):
                        w = load.build(b, offset(b, row, 16 * size * i))
                        b.store(simd.fma.build(b, w, x, b.load(total)), total)
            for at, total in zip(places, totals):
                simd.store_f32.build(b, at, b.load(total))
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 8, types.float32, types.int64, types.float32), codegen

    return segment


def _ask(layout: InputLayout, wide: bool):
    """Intrinsic: fetches what the segment of a coming entry will read."""
    numbers = layout.outputs(wide) * layout.number_bytes if layout.bits else 0

    @intrinsic
    def ask(context, scales, biases, base, row_bytes, neurons, packs):
        def codegen(ctx, b, signature, args):
            scales, biases, base, row_bytes, neurons, packs = args
            for line in range(0, numbers, 64):
                simd.prefetch.build(b, offset(b, scales, line))
                if not layout.symmetric:
                    simd.prefetch.build(b, offset(b, biases, line))
            with cgutils.for_range(b, packs) as loop:
                for r in range(4):
                    at = offset(b, b.add(neurons, b.mul(loop.index, I64(16))), 4 * r)
                    row = row_at(b, layout, base, row_bytes, at)
                    for line in range(0, layout.segment_bytes(wide), 64):
                        simd.prefetch.build(b, offset(b, row, line))
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return ask


def _entry(layout: InputLayout):
    """Numba function: adds an entry's products to the sums of a column: segments first..last-1 and `tail` narrow ones.

    coming, coming_neurons, coming_packs: the entry whose weights are fetched meanwhile; no packs for none.
    """
    make = _quantized_segment if layout.bits else _float_segment
    wide_segment, narrow_segment = make(layout, True), make(layout, False)
    ask_wide, ask_narrow = _ask(layout, True), _ask(layout, False)
    numbers = [layout.outputs(wide) * layout.number_bytes if layout.bits else 0 for wide in (True, False)]
    wide_numbers, narrow_numbers = numbers
    wide_bytes, narrow_bytes = layout.segment_bytes(True), layout.segment_bytes(False)
    wide_sums, narrow_sums = 4 * layout.outputs(True), 4 * layout.outputs(False)

    @numba.njit(error_model="numpy")
    @named(layout.label)
    def entry(sums, group, places, first, last, tail, neurons, packs, quads, d, start, both, coming, coming_neurons,
              coming_packs):  # fmt: skip
        wide, narrow, biases, rows, narrow_rows, _ = places
        stride = wide * wide_bytes
        for i in range(first, last):
            number, row = i * wide_numbers, rows + i * wide_bytes
            ask_wide(coming + number, coming + biases + number, coming + row, stride, coming_neurons, coming_packs)
            here = group + number
            wide_segment(sums, here, here + biases, group + row, stride, neurons, packs, quads, d, start, both)
            sums += wide_sums
        stride = narrow * narrow_bytes
        for i in range(tail):
            number, row = wide * wide_numbers + i * narrow_numbers, narrow_rows + i * narrow_bytes
            ask_narrow(coming + number, coming + biases + number, coming + row, stride, coming_neurons, coming_packs)
            here = group + number
            narrow_segment(sums, here, here + biases, group + row, stride, neurons, packs, quads, d, start, both)
            sums += narrow_sums

    return entry


def _part(layout: InputLayout):
    """Numba function: sums of a column over entries begin..end-1 of a table."""
    entry = _entry(layout)
    quantized, shift = layout.bits > 0, (layout.group_size // 32).bit_length() - 1

    @numba.njit(error_model="numpy")
    @named(layout.label)
    def part(sums, weight, places, first, last, tail, table, groups, x, begin, end):
        n = i32_at(table)
        group_bytes = places[5]
        fine = x + fine_at(32 * n, 1) + 64
        fine_end = fine + (i64_at(fine - 64) * FINE_GROUP if quantized else 0)
        for e in range(begin, end):
            group = weight + (group_of(table, e) >> shift) * group_bytes
            neurons, packs = neurons_of(table, groups, e), (count_of(table, groups, e) + 3) // 4
            coming, coming_packs = group, 0
            if e + 1 < n:
                coming = weight + (group_of(table, e + 1) >> shift) * group_bytes
                coming_packs = (count_of(table, groups, e + 1) + 3) // 4
            if not quantized:
                entry(sums, group, places, first, last, tail, neurons, packs, x + 128 * e, F32(0), 0, F32(0), coming,
                      neurons + 128, coming_packs)  # fmt: skip
                continue
            number = x + 32 * n + 4 * e
            entry(sums, group, places, first, last, tail, neurons, packs, x + 32 * e, f32_at(number),
                  i32_at(number + 8 * n), f32_at(number + 4 * n), coming, neurons + 128, coming_packs)  # fmt: skip
            while fine < fine_end and i32_at(fine) < e:
                fine += FINE_GROUP
            if fine < fine_end and i32_at(fine) == e:
                entry(sums, group, places, first, last, tail, neurons, packs, fine + PLANE, f32_at(fine + SCALE),
                      i32_at(fine + SUM), F32(0), group, neurons, 0)  # fmt: skip

    return part


@functools.cache
def sparse_input_gemv(layout: InputLayout) -> Kernel:
    """Kernel: out = W x (+ bias) (+ residual) for one token, over the inputs of a table. Tile = column * PARTS + part.

    Args:
        layout: of the weights.

    Its arguments: out, rows of it in vectors, weight, its `Places`, wide segments of a column, table, groups of all
    inputs, x (a panel of codes, or compact floats) and bytes between those of threads, memory for the sums of a part
    and for all, counters (a cache line for each column, zeros before and after), bias and residual (0 for none).
    """
    part = _part(layout)
    wide_outputs, narrow_outputs = layout.outputs(True), layout.outputs(False)

    @kernel(f"sparse inputs {layout.label}")
    def sparse_inputs(arguments, tile, thread):
        (out, vectors, weight, wide, narrow, biases, rows, narrow_rows, group_bytes, each, table, groups, x, x_each,
         part_bytes, parts, counters, bias, residual) = unpack(arguments, "iiiiiiiiiiiiiiiiiii")  # fmt: skip
        column, index = tile // PARTS, tile % PARTS
        n = i32_at(table)
        first, last = column * each, min(column * each + each, wide)
        tail = narrow if last == wide else 0
        size = (last - first) * wide_outputs + tail * narrow_outputs
        begin, end = index * n // PARTS, (index + 1) * n // PARTS
        if begin < end:
            sums = parts + tile * part_bytes
            for i in range(0, 4 * size, 64):
                store_f32(sums + i, zeros())
            places = wide, narrow, biases, rows, narrow_rows, group_bytes
            part(sums, weight, places, first, last, tail, table, groups, x + thread * x_each, begin, end)
        if atomic_add(counters + 64 * column, 1) < PARTS - 1:
            return
        atomic_store(counters + 64 * column, 0)
        start = first * wide_outputs * 4
        for i in range(0, min(4 * size, 64 * vectors - start), 64):
            y = zeros()
            for p in range(PARTS):
                if p * n // PARTS < (p + 1) * n // PARTS:
                    y = add(y, load_f32(parts + (column * PARTS + p) * part_bytes + i))
            place = start + i
            finish(y, out + place, bias + place if bias != 0 else 0, residual + place if residual != 0 else 0)

    return sparse_inputs
