"""Products of quantized neurons' rows with one token: lane = group (see `row_layout` and `row_codes`)."""

from __future__ import annotations

from numba.core import cgutils

from cpu_kernels import simd
from cpu_kernels.integer_dots import integer_dots
from cpu_kernels.row_codes import FINE, SCALES, SECOND, SECOND_STARTS, SEGMENT, STARTS, SUMS
from cpu_kernels.row_layout import segments
from cpu_kernels.simd import I64, offset

def products(b, layout, rows, codes, hint):
    """Each row's sums by lane. rows: (part, address of the neuron, from there to what is to be fetched)."""
    totals = [cgutils.alloca_once_value(b, simd.floats(0)) for _ in rows]
    found = segments(layout.inputs)
    whole = sum(m == 16 for _, m in found)
    with cgutils.for_range(b, I64(whole)) as loop:
        base = b.mul(loop.index, I64(layout.codes_at(0, 16)))
        scales = b.mul(loop.index, I64(layout.scales_at(0, 16) - layout.scales_at(0)))
        _segment(b, layout, rows, totals, 16, (base, scales), b.add(codes, b.mul(loop.index, I64(SEGMENT))), hint)
    for number, (first, m) in enumerate(found[whole:], whole):
        distances = (I64(layout.codes_at(0, first)), I64(layout.scales_at(0, first) - layout.scales_at(0)))
        _segment(b, layout, rows, totals, m, distances, offset(b, codes, number * SEGMENT), hint)
    return [b.load(total) for total in totals]


def _segment(b, layout, rows, totals, m, distances, codes, hint):
    with b.if_else(b.icmp_signed("!=", simd.i32_at.build(b, offset(b, codes, FINE)), I64(0))) as (fine, plain):
        for branch, planes in ((fine, 2), (plain, 1)):
            with branch:
                for row, total in zip(rows, totals):
                    b.store(_gained(b, layout, row, b.load(total), m, distances, codes, planes, hint), total)


def _gained(b, layout, row, total, m, distances, codes, planes, hint):
    """total + what a segment adds to it."""
    part, neuron, ahead = row
    to_codes, to_numbers = distances
    stored = layout.stored(b, b.add(offset(b, neuron, layout.codes_at(part)), to_codes), m)
    pre = simd.prefetch if hint == 1 else simd.prefetch_l2
    if hint:
        for at, _ in stored:
            pre.build(b, b.add(at, ahead))
    us = layout.codes(b, [v for _, v in stored])
    sums = simd.ints(0)
    for plane, starts in ((0, STARTS), (SECOND, SECOND_STARTS))[:planes]:
        signed = [simd.load_bytes.build(b, offset(b, codes, plane + 64 * j)) for j in range(m // 2)]
        start = simd.ints(0)
        if layout.tiles.symmetric:
            raw = b.load(simd.pointer(b, offset(b, codes, starts), simd.I.llvm), align=4)
            start = b.shl(raw, simd.ints(layout.tiles.bits - 1))
        sums = b.add(b.shl(sums, simd.ints(8)), integer_dots(b, start, us, signed, layout.tiles.bits))
    at = b.add(offset(b, neuron, layout.scales_at(part)), to_numbers)
    if hint:
        pre.build(b, b.add(at, ahead))
    value = b.fmul(simd.to_float.build(b, sums), simd.load_f32.build(b, offset(b, codes, SCALES)))
    total = simd.fma.build(b, value, layout.numbers(b, at, m), total)
    if layout.tiles.symmetric:
        return total
    at = b.add(offset(b, neuron, layout.biases_at(part)), to_numbers)
    if hint:
        pre.build(b, b.add(at, ahead))
    return simd.fma.build(b, layout.numbers(b, at, m), simd.load_f32.build(b, offset(b, codes, SUMS)), total)


