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
from cpu_kernels.atomics import atomic_add, atomic_store
from cpu_kernels.codes import FINE_GROUP, PLANE, SCALE, SUM, fine_at
from cpu_kernels.compile import Kernel, kernel, named, unpack
from cpu_kernels.finish import finish
from cpu_kernels.float_linear import LOADS
from cpu_kernels.input_layout import InputLayout, interleaved
from cpu_kernels.integer_dots import instruction_set, integer_dots
from cpu_kernels.simd import (
    I32,
    I64,
    B,
    add,
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
AHEAD = 2
PARTS = 16
"""A sum over the list is cut into so many parts, which are joined in order."""
COLUMN = 8
"""Wide segments that one piece of work should have: enough for a run of memory, few enough for many threads."""


SEGMENT = types.void(*[types.int64] * 9, types.float32, types.int64, types.float32)
"""Of what adds an entry's products for a segment of outputs to their sums. Its arguments: sums, their scales and biases,
the first row of the group and the bytes between rows, the entry's neurons and of how many times four it consists, their
int8 codes in the first and the second plane, the scale, the start of integer sums, and what biases are multiplied by."""


def _quantized_segment(layout: InputLayout, wide: bool, fine: bool):
    """Intrinsic: of integers. fine: there is a second plane; the scale is that of its steps."""
    load_number = simd.load_f16 if layout.kind == "f16" else simd.load_f32

    @intrinsic
    def segment(context, sums, scales, biases, base, row_bytes, neurons, packs, quads, second, d, start, both):
        def codegen(ctx, b, signature, args):
            sums, scales, biases, base, row_bytes, neurons, packs, quads, second, d, start, both = args
            planes = (quads, second) if fine else (quads,)
            products = [_zeros(b, layout.vectors(wide)) for _ in planes]
            with cgutils.for_range(b, packs) as loop:
                rows = _rows(b, layout, base, row_bytes, neurons, loop.index)
                codes = _codes(b, layout, interleaved(b, rows, wide))
                for plane, into in zip(planes, products):
                    quad = simd.splat_quad.build(b, b.add(plane, b.mul(loop.index, I64(4))))
                    for place, (code, bits) in zip(into, codes):
                        b.store(integer_dots(b, b.load(place), [code], [quad], bits), place)
            middle = simd.splat(b, b.shl(b.trunc(start, I32), I32(layout.bits - 1)))
            step, factor = simd.splat(b, d), simd.splat(b, both)
            for i, product in enumerate(_joined(b, layout, [[b.load(p) for p in plane] for plane in products])):
                at, skip = offset(b, sums, 64 * i), 16 * layout.number_bytes * i
                product = b.add(product, middle) if layout.symmetric else product
                value = b.fmul(simd.to_float.build(b, product), step)
                total = simd.load_f32.build(b, at)
                total = simd.fma.build(b, value, load_number.build(b, offset(b, scales, skip)), total)
                if not layout.symmetric:
                    total = simd.fma.build(b, load_number.build(b, offset(b, biases, skip)), factor, total)
                simd.store_f32.build(b, at, total)
            return ctx.get_dummy_value()

        return SEGMENT, codegen

    return segment


def _zeros(b, n):
    return [cgutils.alloca_once_value(b, simd.ints(0)) for _ in range(n)]


def _rows(b, layout, base, row_bytes, neurons, pack):
    """Addresses of the rows of four neurons."""
    places = [offset(b, b.add(neurons, b.mul(pack, I64(16))), 4 * r) for r in range(4)]
    numbers = [b.and_(simd.i32_at.build(b, at), I64(layout.group_size - 1)) for at in places]
    return [b.add(base, b.mul(number, row_bytes)) for number in numbers]


def _whole_bytes(layout):
    """Whether products of both halves of bytes are taken at once, then less those of the high half.

    It saves an instruction where dot products of 8 bits take no longer than those of 4.
    """
    return layout.bits == 4 and instruction_set() not in ("avx2", "neon_dot")


def _codes(b, layout, vectors):
    """What is multiplied, and its bits: codes in the order of outputs; the first half whole bytes if they serve."""
    if layout.bits == 8:
        return [(v, 8) for v in vectors]
    if _whole_bytes(layout):
        return [(v, 8) for v in vectors] + [(b.and_(v, ir.Constant(B.llvm, [-16] * 64)), 8) for v in vectors]
    halves = [simd.low_nibbles.build(b, v) for v in vectors] + [simd.high_nibbles.build(b, v) for v in vectors]
    return [(v, 4) for v in halves]


def _joined(b, layout, products):
    """Products of codes, from those of what `_codes` gave, by plane; the first plane's steps are 256 of the second."""
    first, *second = products
    if second:
        first = [b.add(b.shl(x, simd.ints(8)), y) for x, y in zip(first, *second)]
    if not _whole_bytes(layout):
        return first
    low, high = first[: len(first) // 2], first[len(first) // 2 :]
    return [b.sub(x, y) for x, y in zip(low, high)] + [b.ashr(y, simd.ints(4)) for y in high]


def _float_segment(layout: InputLayout, wide: bool):
    """Intrinsic: of floats; instead of codes there are the inputs, and the rest is nothing."""
    load, size = LOADS[layout.kind]

    @intrinsic
    def segment(context, sums, scales, biases, base, row_bytes, neurons, packs, x, second, d, start, both):
        def codegen(ctx, b, signature, args):
            sums, _, _, base, row_bytes, neurons, packs, x, *_ = args
            places = [offset(b, sums, 64 * i) for i in range(layout.vectors(wide))]
            totals = [cgutils.alloca_once_value(b, simd.load_f32.build(b, at)) for at in places]
            with cgutils.for_range(b, packs) as loop:
                for r, row in enumerate(_rows(b, layout, base, row_bytes, neurons, loop.index)):
                    factor = simd.splat_f32_at.build(b, offset(b, b.add(x, b.mul(loop.index, I64(16))), 4 * r))
                    for i, total in enumerate(totals):
                        w = load.build(b, offset(b, row, 16 * size * i))
                        b.store(simd.fma.build(b, w, factor, b.load(total)), total)
            for at, total in zip(places, totals):
                simd.store_f32.build(b, at, b.load(total))
            return ctx.get_dummy_value()

        return SEGMENT, codegen

    return segment


def _ask(layout: InputLayout, wide: bool):
    """Intrinsic: fetches what the segment of a coming entry will read."""
    numbers = layout.outputs(wide) * layout.number_bytes if layout.bits else 0

    @intrinsic
    def ask(context, scales, biases, base, row_bytes, neurons, packs):
        def codegen(ctx, b, signature, args):
            scales, biases, base, row_bytes, neurons, packs = args
            for line in range(0, numbers, 64):
                simd.prefetch_l2.build(b, offset(b, scales, line))
                if not layout.symmetric:
                    simd.prefetch_l2.build(b, offset(b, biases, line))
            with cgutils.for_range(b, packs) as loop:
                for row in _rows(b, layout, base, row_bytes, neurons, loop.index):
                    for line in range(0, layout.segment_bytes(wide), 64):
                        simd.prefetch_l2.build(b, offset(b, row, line))
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return ask


def _entry(layout: InputLayout, fine: bool = False):
    """Numba function: adds an entry's products to the sums of a column: segments first..last-1 and `tail` narrow ones.

    coming, coming_neurons, coming_packs: the entry whose weights are fetched meanwhile; no packs for none.
    """
    wide_segment, narrow_segment = (
        _quantized_segment(layout, wide, fine) if layout.bits else _float_segment(layout, wide)
        for wide in (True, False)
    )
    ask_wide, ask_narrow = _ask(layout, True), _ask(layout, False)
    numbers = [layout.outputs(wide) * layout.number_bytes if layout.bits else 0 for wide in (True, False)]
    wide_numbers, narrow_numbers = numbers
    wide_bytes, narrow_bytes = layout.segment_bytes(True), layout.segment_bytes(False)
    wide_sums, narrow_sums = 4 * layout.outputs(True), 4 * layout.outputs(False)

    @numba.njit(error_model="numpy")
    @named(f"{layout.label}{' fine' if fine else ''}")
    def entry(sums, group, places, first, last, tail, neurons, packs, quads, second, d, start, both, coming,
              coming_neurons, coming_packs):  # fmt: skip
        wide, narrow, biases, rows, narrow_rows, _ = places
        stride = wide * wide_bytes
        for i in range(first, last):
            number, row = i * wide_numbers, rows + i * wide_bytes
            ask_wide(coming + number, coming + biases + number, coming + row, stride, coming_neurons, coming_packs)
            here = group + number
            wide_segment(sums, here, here + biases, group + row, stride, neurons, packs, quads, second, d, start, both)
            sums += wide_sums
        stride = narrow * narrow_bytes
        for i in range(tail):
            number, row = wide * wide_numbers + i * narrow_numbers, narrow_rows + i * narrow_bytes
            ask_narrow(coming + number, coming + biases + number, coming + row, stride, coming_neurons, coming_packs)
            here = group + number
            narrow_segment(sums, here, here + biases, group + row, stride, neurons, packs, quads, second, d, start,
                           both)  # fmt: skip
            sums += narrow_sums

    return entry


def _part(layout: InputLayout):
    """Numba function: sums of a column over entries begin..end-1 of a table."""
    coarse_entry, fine_entry = _entry(layout), _entry(layout, True)
    shift = (layout.group_size // 32).bit_length() - 1

    @numba.njit(error_model="numpy")
    @named(layout.label)
    def part(sums, weight, places, first, last, tail, table, groups, x, begin, end):
        n = i32_at(table)
        fine = x + fine_at(32 * n, 1) + 64
        fine_end = fine + i64_at(fine - 64) * FINE_GROUP
        for e in range(begin, end):
            group, neurons, packs = _place(weight, places, shift, table, groups, e)
            coming, coming_neurons, coming_packs = _place(weight, places, shift, table, groups, min(e + AHEAD, n - 1))
            number = x + 32 * n + 4 * e
            d, both, start = f32_at(number), f32_at(number + 4 * n), i32_at(number + 8 * n)
            while fine < fine_end and i32_at(fine) < e:
                fine += FINE_GROUP
            if fine < fine_end and i32_at(fine) == e:
                start = (start << 8) + i32_at(fine + SUM)
                fine_entry(sums, group, places, first, last, tail, neurons, packs, x + 32 * e, fine + PLANE,
                           f32_at(fine + SCALE), start, both, coming, coming_neurons, coming_packs)  # fmt: skip
            else:
                coarse_entry(sums, group, places, first, last, tail, neurons, packs, x + 32 * e, 0, d, start, both,
                             coming, coming_neurons, coming_packs)  # fmt: skip

    return part


def _float_part(layout: InputLayout):
    """The same for floats."""
    entry = _entry(layout)

    @numba.njit(error_model="numpy")
    @named(layout.label)
    def part(sums, weight, places, first, last, tail, table, groups, x, begin, end):
        n = i32_at(table)
        for e in range(begin, end):
            group, neurons, packs = _place(weight, places, 0, table, groups, e)
            coming, coming_neurons, coming_packs = _place(weight, places, 0, table, groups, min(e + AHEAD, n - 1))
            entry(sums, group, places, first, last, tail, neurons, packs, x + 128 * e, 0, F32(0), 0, F32(0),
                  coming, coming_neurons, coming_packs)  # fmt: skip

    return part


@numba.njit(error_model="numpy")
def _place(weight, places, shift, table, groups, e):
    """An entry's weights and neurons, and of how many times four these are."""
    group = weight + (group_of(table, e) >> shift) * places[5]
    return group, neurons_of(table, groups, e), (count_of(table, groups, e) + 3) // 4


@functools.cache
def sparse_input_gemv(layout: InputLayout) -> Kernel:
    """Kernel: out = W x (+ bias) (+ residual) for one token, over the inputs of a table. Tile = column * PARTS + part.

    Args:
        layout: of the weights.

    Its arguments: out, rows of it in vectors, weight, its `Places`, wide segments of a column, table, groups of all
    inputs, x (a panel of codes, or compact floats) and bytes between those of threads, memory for the sums of a part
    and for all, counters (a cache line for each column, zeros before and after), bias and residual (0 for none).
    """
    part = _part(layout) if layout.bits else _float_part(layout)
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
