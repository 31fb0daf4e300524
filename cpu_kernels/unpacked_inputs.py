"""The selected inputs of weights by inputs as tiles of 16 rows, which products with several tokens read."""

from __future__ import annotations

import functools

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.compile import named
from cpu_kernels.float_linear import LOADS
from cpu_kernels.input_layout import InputLayout
from cpu_kernels.input_segments import rows_of
from cpu_kernels.simd import I8, I16, I32, I64, B, i32_at, offset, store_f32, zeros
from cpu_kernels.sparse_inputs import place_of
from cpu_kernels.table import count_of
from cpu_kernels.unpacked import group_bytes


def unpacked_bytes(layout: InputLayout) -> int:
    """Bytes of an entry: those of an unpacked group, or [32 inputs][16 rows] floats."""
    return group_bytes(layout.unpacked) if layout.bits else 32 * 64


def _vector(b, row, vector, wide):
    """16 bytes of a row's segment: codes of the outputs of one vector, in order."""
    runs, step = (4, 4) if wide else (2, 8)
    kind = ir.VectorType(I32, 16 if wide else 8)
    words = b.load(simd.pointer(b, b.add(row, b.mul(vector, I64(step))), kind), align=1)
    order = [j % runs * 4 + j // runs for j in range(4)]
    return b.bitcast(b.shuffle_vector(words, words, ir.Constant(ir.VectorType(I32, 4), order)), ir.VectorType(I8, 16))


def _interleaved(b, vectors):
    """Elements of vectors in turn, two at a time."""
    n = vectors[0].type.count
    order = ir.Constant(ir.VectorType(I32, 2 * n), [i // 2 + i % 2 * n for i in range(2 * n)])
    return [b.shuffle_vector(*vectors[i : i + 2], order) for i in range(0, len(vectors), 2)]


def _unpack_entry(layout: InputLayout, wide: bool):
    """Intrinsic: unpacks 16 outputs of an entry; `shift` is 4 for the high halves of bytes."""
    load_number = simd.load_f16 if layout.kind == "f16" else simd.load_f32

    @intrinsic
    def unpack_entry(context, unpacked, scales, biases, base, row_bytes, neurons, packs, vector, shift):
        def codegen(ctx, b, signature, args):
            unpacked, scales, biases, base, row_bytes, neurons, packs, vector, shift = args
            for j in range(8):
                b.store(ir.Constant(B.llvm, [0] * 64), simd.pointer(b, offset(b, unpacked, 64 * j), B.llvm), align=4)
            with cgutils.for_range(b, packs) as loop:
                rows = rows_of(b, layout, base, row_bytes, neurons, loop.index)
                pairs = _interleaved(b, [_vector(b, row, vector, wide) for row in rows])
                (quads,) = _interleaved(b, [b.bitcast(pair, ir.VectorType(I16, 16)) for pair in pairs])
                codes = b.bitcast(quads, simd.I.llvm)
                if layout.bits == 4:
                    codes = b.and_(b.lshr(codes, simd.splat(b, b.trunc(shift, I32))), simd.ints(0x0F0F0F0F))
                at = b.add(unpacked, b.mul(loop.index, I64(64)))
                b.store(codes, simd.pointer(b, at, simd.I.llvm), align=4)
            numbers = [scales] if layout.symmetric else [scales, biases]
            for i, at in enumerate(numbers):
                simd.store_f32.build(b, offset(b, unpacked, 512 + 64 * i), load_number.build(b, at))
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return unpack_entry


@functools.cache
def unpack_inputs(layout: InputLayout):
    """Numba function (unpacked, weight, places, tile, table, groups): 16 outputs times a table's entries.

    Of integers each entry becomes a group of `unpacked.py` (of `layout.unpacked`): its selected neurons in the table's
    order, then zeros. Of floats, [32 neurons][16 outputs] float32.

    Args:
        layout: of the weights; `places` is what it says of them.
    """
    return _unpack_integers(layout) if layout.bits else _unpack_floats(layout)


def _unpack_integers(layout: InputLayout):
    wide_entry, narrow_entry = _unpack_entry(layout, True), _unpack_entry(layout, False)
    wide_vectors, narrow_vectors = layout.vectors(True), layout.vectors(False)
    wide_bytes, narrow_bytes = layout.segment_bytes(True), layout.segment_bytes(False)
    halves = 2 if layout.bits == 4 else 1
    number, size, nbytes = layout.number_bytes, layout.group_size, unpacked_bytes(layout)

    @numba.njit(error_model="numpy")
    @named(layout.label)
    def unpack_inputs(unpacked, weight, places, tile, table, groups):
        wide, narrow, biases, rows, narrow_rows, _ = places
        for e in range(i32_at(table)):
            group, neurons, packs = place_of(weight, places, size, table, groups, e)
            scales = group + 16 * tile * number
            if tile < wide * wide_vectors:
                base, vector = group + rows + tile // wide_vectors * wide_bytes, tile % wide_vectors
                half = wide_vectors // halves
                wide_entry(unpacked, scales, scales + biases, base, wide * wide_bytes, neurons, packs, vector % half,
                           vector // half * 4)  # fmt: skip
            else:
                index = tile - wide * wide_vectors
                base, vector = group + narrow_rows + index // narrow_vectors * narrow_bytes, index % narrow_vectors
                half = narrow_vectors // halves
                narrow_entry(unpacked, scales, scales + biases, base, narrow * narrow_bytes, neurons, packs,
                             vector % half, vector // half * 4)  # fmt: skip
            unpacked += nbytes

    return unpack_inputs


def _unpack_floats(layout: InputLayout):
    load, size = LOADS[layout.kind]

    @numba.njit(error_model="numpy")
    @named(layout.label)
    def unpack_inputs(unpacked, weight, places, tile, table, groups):
        wide, narrow, _, rows, narrow_rows, _ = places
        for e in range(i32_at(table)):
            group, neurons, _ = place_of(weight, places, 32, table, groups, e)
            for i in range(count_of(table, groups, e)):
                row = i32_at(neurons + 4 * i) % 32
                if tile < 4 * wide:
                    at = group + rows + (row * wide * 4 + tile) * 16 * size
                else:
                    at = group + narrow_rows + (row * narrow + tile - 4 * wide) * 16 * size
                store_f32(unpacked + 64 * i, load(at))
            for i in range(count_of(table, groups, e), 32):
                store_f32(unpacked + 64 * i, zeros())
            unpacked += 32 * 64

    return unpack_inputs
