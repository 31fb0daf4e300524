"""Products of quantized neurons' rows with one token: lane = group (see `row_layout` and `row_codes`)."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from cpu_kernels import simd
from cpu_kernels.integer_dots import integer_dots
from cpu_kernels.row_codes import FINE, SCALES, SECOND, SECOND_STARTS, SEGMENT, STARTS, SUMS
from cpu_kernels.simd import I64, offset


def quantized_products(b, layout, neuron, ahead, codes):
    """Builds the sums by lane of each row of a neuron.

    Args:
        neuron: its address.
        ahead: distance from there to what is to be fetched.
        codes: address of the token's.
    """
    totals = [cgutils.alloca_once(b, simd.F.llvm) for _ in range(layout.parts)]
    for total in totals:
        b.store(simd.floats(0), total)
    with cgutils.for_range(b, I64(layout.n_whole)) as loop:
        at, token = (b.add(x, b.mul(loop.index, I64(n))) for x, n in ((neuron, layout.whole.nbytes), (codes, SEGMENT)))
        _add_block(b, layout.whole, at, ahead, token, totals)
    for number, block in enumerate(layout.rest, layout.n_whole):
        _add_block(b, block, offset(b, neuron, block.at), ahead, offset(b, codes, number * SEGMENT), totals)
    return [b.load(total) for total in totals]


def _add_block(b, block, at, ahead, token, totals):
    """Adds what the block at an address gives to the rows' totals. token: address of its codes for the block."""
    with b.if_else(b.icmp_signed("!=", simd.i32_at.build(b, offset(b, token, FINE)), I64(0))) as (fine, plain):
        for branch, planes in ((fine, 2), (plain, 1)):
            with branch:
                for line in range(0, block.nbytes, 64):
                    simd.prefetch_l2.build(b, b.add(offset(b, at, line), ahead))
                for segment in range(block.segments):
                    _add_segment(b, block, segment, at, token, planes, totals)


def _add_segment(b, block, segment, at, token, planes, totals):
    """Adds a segment's products to its rows' totals."""
    value = b.fmul(_sums(b, block, segment, at, token, planes), simd.load_f32.build(b, offset(b, token, SCALES)))
    scales = block.numbers(b, offset(b, at, block.scales_at(segment)))
    biases = None if block.tiles.symmetric else block.numbers(b, offset(b, at, block.biases_at(segment)))
    for part, total in enumerate(totals):
        mine = [row + segment == part for row in _rows_of_lanes(block)]
        if not any(mine):
            continue
        before = b.load(total)
        after = simd.fma.build(b, value, scales, before)
        if biases is not None:
            after = simd.fma.build(b, biases, simd.load_f32.build(b, offset(b, token, SUMS)), after)
        lanes = ir.Constant(ir.VectorType(ir.IntType(1), 16), [int(m) for m in mine])
        b.store(after if all(mine) else b.select(lanes, after, before), total)


def _rows_of_lanes(block):
    """The row that each lane of a block's first segment belongs to. A partner of zeros may go with any."""
    owners = [block.owners[lane % block.m] for lane in range(16)]
    return [0 if owner is None else owner[0] for owner in owners]


def _sums(b, block, segment, at, token, planes):
    """The integer sums of a segment by lane, as floats."""
    us, sums = block.codes(b, block.stored(b, at, segment)), None
    for plane, starts in ((0, STARTS), (SECOND, SECOND_STARTS))[:planes]:
        signed = [simd.load_bytes.build(b, offset(b, token, plane + 64 * j)) for j in range(block.m // 2)]
        start = b.load(simd.pointer(b, offset(b, token, starts), simd.I.llvm), align=4)
        new = integer_dots(b, start, us, signed, block.tiles.bits)
        sums = new if sums is None else b.add(b.shl(sums, simd.ints(8)), new)
    return simd.to_float.build(b, sums)
