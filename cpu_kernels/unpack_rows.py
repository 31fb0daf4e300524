"""Rows of picked neurons as a tile of 16 rows: unpacked as `unpacked` describes, or floats [inputs][16 rows]."""

from __future__ import annotations

import functools

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.float_linear import LOADS
from cpu_kernels.float_rows import FloatRows
from cpu_kernels.row_layout import RowLayout
from cpu_kernels.simd import I64, LANES, offset
from cpu_kernels.transpose import transpose
from cpu_kernels.unpacked import group_bytes


@functools.cache
def unpack_rows(layout: RowLayout, part: int):
    """Intrinsic: unpacks one row of each of up to 16 neurons.

    Its arguments: the unpacked tile, weights, where int32 numbers of neurons are, and how many, at least 1. Further
    rows of the tile are copies of the last.

    Args:
        layout: of the weights.
        part: which row of a neuron: with two, 0 is gate and 1 is up.
    """

    @intrinsic
    def unpack_rows(context, unpacked, weights, neurons, count):
        def codegen(ctx, b, signature, args):
            unpacked, weights, neurons, count = args
            place = cgutils.alloca_once(b, I64, LANES)
            for i, row in enumerate(_neurons(b, layout, weights, neurons, count)):
                b.store(row, b.gep(place, [I64(i)]))
            if layout.n_whole:
                run = (layout.whole, part, 0, 0, 16)
                with cgutils.for_range(b, I64(layout.n_whole)) as loop:
                    step = b.mul(loop.index, I64(layout.whole.nbytes))
                    groups = b.mul(loop.index, I64(16 * group_bytes(layout.tiles)))
                    _run(b, layout, run, place, step, b.add(unpacked, groups))
            for run in layout.runs(part)[layout.n_whole :]:
                _run(b, layout, run, place, I64(run[0].at), unpacked)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return unpack_rows


@functools.cache
def unpack_float_rows(layout: FloatRows, part: int):
    """The same for floats."""
    load, size = LOADS[layout.kind]

    @intrinsic
    def unpack_float_rows(context, unpacked, weights, neurons, count):
        def codegen(ctx, b, signature, args):
            unpacked, weights, neurons, count = args
            place = cgutils.alloca_once(b, I64, LANES)
            for i, row in enumerate(_neurons(b, layout, weights, neurons, count)):
                b.store(offset(b, row, part * layout.row_bytes), b.gep(place, [I64(i)]))
            # Rows have zeros up to a whole vector.
            with cgutils.for_range(b, I64(-(-layout.inputs // LANES))) as loop:
                moved = b.mul(loop.index, I64(LANES * size))
                rows = [load.build(b, b.add(b.load(b.gep(place, [I64(i)])), moved)) for i in range(LANES)]
                at = b.add(unpacked, b.mul(loop.index, I64(LANES * 64)))
                for i, column in enumerate(transpose(b, rows)):
                    simd.store_f32.build(b, offset(b, at, 64 * i), column)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return unpack_float_rows


def _neurons(b, layout, weights, neurons, count):
    """Addresses of 16 listed neurons, of which there are fewer: then again that of the last."""
    last, found = b.sub(count, I64(1)), []
    for i in range(LANES):
        listed = b.select(b.icmp_signed("<", I64(i), last), I64(i), last)
        number = simd.i32_at.build(b, b.add(neurons, b.shl(listed, I64(2))))
        found.append(b.add(weights, b.mul(number, I64(layout.neuron_bytes))))
    return found


def _run(b, layout, run, place, distance, unpacked):
    """Writes a run of groups (see RowLayout.runs) of 16 rows, whose blocks are at a distance from their neurons."""
    block, segment, first, group, count = run
    size = group_bytes(layout.tiles)
    rows = [b.add(b.load(b.gep(place, [I64(i)])), distance) for i in range(LANES)]

    def target(lane):
        """Where the quads of a lane go; None for lanes of other rows."""
        mine = lane % block.m - first
        if not 0 <= mine < count:
            return None
        return offset(b, unpacked, (group + mine) * size + lane // block.m * (block.m // 2) * 64)

    with cgutils.for_range(b, I64(block.vectors)) as loop:
        moved = b.mul(loop.index, I64(64))
        words = [block.words(b, b.add(offset(b, row, block.codes_at(segment)), moved)) for row in rows]
        for i, word in enumerate(transpose(b, words)[: block.lanes]):
            for vector, lane, codes in block.quads(b, i, b.bitcast(word, simd.B.llvm)):
                at = target(lane)
                if at is not None:
                    here = b.add(offset(b, at, 64 * vector), moved)
                    b.store(codes, simd.pointer(b, here, simd.B.llvm), align=4)
    numbers = [block.scales_at] if layout.tiles.symmetric else [block.scales_at, block.biases_at]
    for i, where in enumerate(numbers):
        columns = transpose(b, [block.numbers(b, offset(b, row, where(segment))) for row in rows])
        for lane, column in enumerate(columns[: block.m]):
            at = target(lane)
            if at is not None:
                simd.store_f32.build(b, offset(b, at, 512 + 64 * i), column)
