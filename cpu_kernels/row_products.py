"""Products of quantized neurons' rows with one token: lane = group (see `row_layout` and `row_codes`)."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from cpu_kernels import simd
from cpu_kernels.integer_dots import integer_dots
from cpu_kernels.row_codes import FINE, SCALES, SECOND, SECOND_STARTS, SEGMENT, STARTS, SUMS
from cpu_kernels.simd import I64, offset


def quantized_products(b, layout, neurons, codes):
    """Builds the sums by lane of each row of some neurons: [part][neuron].

    Args:
        neurons: (address, distance from there to what is to be fetched).
        codes: address of the token's.
    """
    totals = [[cgutils.alloca_once_value(b, simd.floats(0)) for _ in neurons] for _ in range(layout.parts)]
    with cgutils.for_range(b, I64(layout.whole // 16)) as loop:
        to_codes, to_numbers = (b.mul(loop.index, I64(at(16) - at(0))) for at in (layout.codes_at, layout.scales_at))

        def add_whole(planes):
            here = b.add(codes, b.mul(loop.index, I64(SEGMENT)))
            for part, mine in enumerate(totals):
                for (neuron, ahead), total in zip(neurons, mine):
                    segment = _Segment(b, layout, part * layout.whole, 16, here)
                    moved = (b.add(neuron, to_codes), b.add(neuron, to_numbers), ahead)
                    b.store(segment.gained(b.load(total), *segment.sums(moved, planes)), total)

        _by_planes(b, b.add(codes, b.mul(loop.index, I64(SEGMENT))), add_whole)
    for number, (place, m) in enumerate(layout.rest_segments, layout.whole // 16):
        segment = _Segment(b, layout, place, m, offset(b, codes, number * SEGMENT))

        def add_rest(planes, segment=segment):
            for i, (neuron, ahead) in enumerate(neurons):
                added = segment.sums((neuron, neuron, ahead), planes)
                for part, mine in enumerate(totals):
                    before = b.load(mine[i])
                    b.store(segment.kept(part, segment.gained(before, *added), before), mine[i])

        _by_planes(b, segment.token, add_rest)
    return [[b.load(total) for total in mine] for mine in totals]


def _by_planes(b, token, add):
    """`add` for two planes if the token's segment has a fine group, else for one."""
    with b.if_else(b.icmp_signed("!=", simd.i32_at.build(b, offset(b, token, FINE)), I64(0))) as (fine, plain):
        with fine:
            add(2)
        with plain:
            add(1)


class _Segment:
    """Writes the products of one segment.

    Args:
        place, m: of its first group in a neuron, and how many groups.
        token: address of the token's codes for it.
    """

    def __init__(self, b, layout, place, m, token):
        self.b, self.layout, self.place, self.m, self.token = b, layout, place, m, token

    def _at(self, address, ahead, distance):
        at = offset(self.b, address, distance)
        simd.prefetch_l2.build(self.b, self.b.add(at, ahead))
        return at

    def sums(self, neuron, planes):
        """What a neuron's segment adds by lane: products, scales, and biases or None."""
        b, layout, m = self.b, self.layout, self.m
        to_codes, to_numbers, ahead = neuron
        at = offset(b, to_codes, layout.codes_at(self.place))
        for line in range(0, m * 4 * layout.tiles.bits, 64):
            simd.prefetch_l2.build(b, b.add(offset(b, at, line), ahead))
        us = layout.codes(b, layout.stored(b, at, m))
        sums = None
        for plane, starts in ((0, STARTS), (SECOND, SECOND_STARTS))[:planes]:
            signed = [simd.load_bytes.build(b, offset(b, self.token, plane + 64 * j)) for j in range(m // 2)]
            start = b.load(simd.pointer(b, offset(b, self.token, starts), simd.I.llvm), align=4)
            new = integer_dots(b, start, us, signed, layout.tiles.bits)
            sums = new if sums is None else b.add(b.shl(sums, simd.ints(8)), new)
        value = b.fmul(simd.to_float.build(b, sums), simd.load_f32.build(b, offset(b, self.token, SCALES)))
        scales = layout.numbers(b, self._at(to_numbers, ahead, layout.scales_at(self.place)), m)
        if layout.tiles.symmetric:
            return value, scales, None
        return value, scales, layout.numbers(b, self._at(to_numbers, ahead, layout.biases_at(self.place)), m)

    def gained(self, total, value, scales, biases):
        """total + what `sums` found."""
        total = simd.fma.build(self.b, value, scales, total)
        if biases is None:
            return total
        return simd.fma.build(self.b, biases, simd.load_f32.build(self.b, offset(self.b, self.token, SUMS)), total)

    def kept(self, part, new, before):
        """new where a lane's group is of that row, else before."""
        mine = [self.layout.owner(self.place + lane % self.m)[0] == part for lane in range(16)]
        if all(mine) or self.layout.parts == 1:
            return new
        lanes = ir.Constant(ir.VectorType(ir.IntType(1), 16), [int(m) for m in mine])
        return self.b.select(lanes, new, before) if any(mine) else before
