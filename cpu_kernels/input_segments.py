"""What four inputs at a time add to a segment of outputs, of weights by inputs (`input_layout`)."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.float_linear import LOADS
from cpu_kernels.input_layout import InputLayout, interleaved
from cpu_kernels.integer_dots import instruction_set, integer_dots
from cpu_kernels.simd import I32, I64, B, offset

SEGMENT = types.void(*[types.int64] * 9, types.float32, types.int64, types.float32)
"""Of what adds an entry's products for a segment to the sums of its outputs. Its arguments: sums, their scales and
biases, the first row of the group and the bytes between rows, the entry's neurons and of how many times four it
consists, their int8 codes in the first and the second plane, the scale, what integer sums start with, and what biases
are multiplied by."""


def quantized_segment(layout: InputLayout, wide: bool, fine: bool):
    """Intrinsic: of integers. fine: there is a second plane; the scale is that of its steps."""
    load_number = simd.load_f16 if layout.kind == "f16" else simd.load_f32

    @intrinsic
    def segment(context, sums, scales, biases, base, row_bytes, neurons, packs, quads, second, d, start, both):
        def codegen(ctx, b, signature, args):
            sums, scales, biases, base, row_bytes, neurons, packs, quads, second, d, start, both = args
            planes = (quads, second) if fine else (quads,)
            products = [_zeros(b, layout.vectors(wide)) for _ in planes]
            with cgutils.for_range(b, packs) as loop:
                rows = rows_of(b, layout, base, row_bytes, neurons, loop.index)
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


def rows_of(b, layout, base, row_bytes, neurons, pack):
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


def float_segment(layout: InputLayout, wide: bool):
    """Intrinsic: of floats; instead of codes there are the inputs, and the rest is nothing."""
    load, size = LOADS[layout.kind]

    @intrinsic
    def segment(context, sums, scales, biases, base, row_bytes, neurons, packs, x, second, d, start, both):
        def codegen(ctx, b, signature, args):
            sums, _, _, base, row_bytes, neurons, packs, x, *_ = args
            places = [offset(b, sums, 64 * i) for i in range(layout.vectors(wide))]
            totals = [cgutils.alloca_once_value(b, simd.load_f32.build(b, at)) for at in places]
            with cgutils.for_range(b, packs) as loop:
                for r, row in enumerate(rows_of(b, layout, base, row_bytes, neurons, loop.index)):
                    factor = simd.splat_f32_at.build(b, offset(b, b.add(x, b.mul(loop.index, I64(16))), 4 * r))
                    for i, total in enumerate(totals):
                        w = load.build(b, offset(b, row, 16 * size * i))
                        b.store(simd.fma.build(b, w, factor, b.load(total)), total)
            for at, total in zip(places, totals):
                simd.store_f32.build(b, at, b.load(total))
            return ctx.get_dummy_value()

        return SEGMENT, codegen

    return segment
