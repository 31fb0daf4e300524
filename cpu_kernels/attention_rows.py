"""The two products of attention, register-blocked: scores of rows of queries, and sums of values weighted by rows.

Keys lie 16 positions to a vector, so scores need no sums across lanes. However many rows and vectors share a loop, each
row's sums run over dimensions, or positions, in ascending order: a row alone gets the same bits.
"""

from __future__ import annotations

import functools

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.simd import I64, offset


@functools.cache
def registers() -> int:
    """Vectors of 16 float32 that the instruction set's registers hold."""
    if "avx512f" in simd.features():
        return 32
    # 16 registers of 256 bits; 32 (Arm) or 16 of 128 bits.
    return 8 if "fma" in simd.features() else 4


def _fits(rows: int, vectors: int) -> bool:
    """Whether a sum for every row and vector, the vectors and one factor stay in registers."""
    return rows * vectors + vectors + 1 <= registers()


def _slices(rows: int, vectors: int) -> list[tuple[int, int, int]]:
    """Parts of rows that fit, of at most two sizes: (first row, rows of a part, such parts)."""
    most = max(r for r in range(1, rows + 1) if r == 1 or _fits(r, vectors))
    parts = -(-rows // most)
    small, more = divmod(rows, parts)
    sizes = [(0, small + 1, more), ((small + 1) * more, small, parts - more)]
    return [size for size in sizes if size[2]]


def side_by_side(rows: int, available: int) -> int:
    """How many vectors share a loop of so many rows: at most 5, a divisor of those available.

    Each product costs a part of a factor's load and a part of a vector's load and conversion.
    """

    def cost(vectors: int) -> float:
        return 1 / vectors + 2 / max(n for _, n, _ in _slices(rows, vectors))

    fitting = [v for v in range(1, 6) if available % v == 0 and (v == 1 or _fits(1, v))]
    return min(fitting, key=cost)


def _accumulate(b, sums, count, factors, factor_stride, vectors_at, ahead, load):
    """Adds `count` products to rows of sums in registers, and stores them.

    Args:
        sums: addresses [rows][vectors].
        factors: address of the first row's factors, one after the other; rows are factor_stride bytes apart.
        vectors_at: address of the vectors of a step of the loop.
        ahead: bytes from there to what is fetched meanwhile.
        load: whether to add to what is there; else to zeros.
    """
    slots = [[cgutils.alloca_once(b, simd.F.llvm) for _ in row] for row in sums]
    for row, places in zip(slots, sums):
        for slot, place in zip(row, places):
            b.store(simd.load_f32.build(b, place) if load else simd.floats(0), slot)
    with cgutils.for_range(b, count) as loop:
        vectors, lines = vectors_at(loop.index)
        for line in lines:
            simd.prefetch_l2.build(b, b.add(line, ahead))
        factor_at = b.add(factors, b.mul(loop.index, I64(4)))
        vectors = [simd.load_f16.build(b, at) for at in vectors]
        for r, row in enumerate(slots):
            factor = simd.splat_f32_at.build(b, offset(b, factor_at, r * factor_stride))
            for slot, vector in zip(row, vectors):
                b.store(simd.fma.build(b, vector, factor, b.load(slot)), slot)
    for row, places in zip(slots, sums):
        for slot, place in zip(row, places):
            simd.store_f32.build(b, place, b.load(slot))


def _grid(b, start, rows, row_stride, vectors):
    """Addresses [rows][vectors]."""
    return [[offset(b, start, r * row_stride + 64 * i) for i in range(vectors)] for r in range(rows)]


@functools.cache
def scores(rows: int, blocks: int, head_dim: int, query_stride: int, score_stride: int):
    """Intrinsic: scores of `blocks` x 16 positions for `rows` queries.

    Its arguments are addresses: scores, queries, keys as blocks of [padded][16 positions] float16, and memory of the
    keys' size that will be read next.
    """
    block_bytes = -(-head_dim // 16) * 512

    @intrinsic
    def made(context, out, queries, keys, ahead):
        def codegen(ctx, b, signature, args):
            out, queries, keys, ahead = args

            def keys_at(dimension):
                # What is fetched meanwhile has one stream, not one for each block.
                at = b.add(keys, b.mul(dimension, I64(32)))
                soon = b.add(keys, b.mul(dimension, I64(32 * blocks)))
                lines = [offset(b, soon, line) for line in range(0, 32 * blocks, 64)]
                return [offset(b, at, i * block_bytes) for i in range(blocks)], lines

            for first, n, parts in _slices(rows, blocks):
                with cgutils.for_range(b, I64(parts)) as part:
                    row = b.add(I64(first), b.mul(part.index, I64(n)))
                    sums = _grid(b, b.add(out, b.mul(row, I64(score_stride))), n, score_stride, blocks)
                    query = b.add(queries, b.mul(row, I64(query_stride)))
                    _accumulate(b, sums, I64(head_dim), query, query_stride, keys_at, b.sub(ahead, keys), False)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return made


@functools.cache
def weighted_values(rows: int, padded: int, weight_stride: int, result_stride: int):
    """Intrinsic: adds weighted values of n positions to `rows` sums.

    Its arguments: addresses of sums, weights, values [n][padded] float16, and memory of the values' size that will be
    read next; then n.
    """
    across = padded // 16
    vectors = side_by_side(rows, across)

    @intrinsic
    def made(context, out, weights, values, ahead, n):
        def codegen(ctx, b, signature, args):
            out, weights, values, ahead, n = args
            for first, some, parts in _slices(rows, vectors):
                with (
                    cgutils.for_range(b, I64(parts)) as part,
                    cgutils.for_range(b, I64(across // vectors)) as column,
                ):
                    row = b.add(I64(first), b.mul(part.index, I64(some)))
                    left = b.add(values, b.mul(column.index, I64(32 * vectors)))

                    def values_at(position, left=left):
                        at = b.add(left, b.mul(position, I64(padded * 2)))
                        lines = [offset(b, at, line) for line in range(0, 32 * vectors, 64)]
                        return [offset(b, at, 32 * i) for i in range(vectors)], lines

                    place = b.add(out, b.mul(row, I64(result_stride)))
                    place = b.add(place, b.mul(column.index, I64(64 * vectors)))
                    sums = _grid(b, place, some, result_stride, vectors)
                    weight = b.add(weights, b.mul(row, I64(weight_stride)))
                    _accumulate(b, sums, n, weight, weight_stride, values_at, b.sub(ahead, values), True)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return made


@functools.cache
def listed_values(padded: int):
    """Intrinsic: the weighted sum of listed rows.

    Its arguments: addresses of the sum, of weights, of int64 row numbers, and of the values [row][padded] float16; then
    how many are listed.
    """
    across = padded // 16
    # Each sum's vector is used once, so that one register serves them all.
    vectors = max(v for v in range(1, across + 1) if across % v == 0 and (v == 1 or v + 2 <= registers()))

    @intrinsic
    def made(context, out, weights, rows, values, n):
        def codegen(ctx, b, signature, args):
            out, weights, rows, values, n = args
            with cgutils.for_range(b, I64(across // vectors)) as column:

                def values_at(i):
                    row = simd.i64_at.build(b, b.add(rows, b.mul(i, I64(8))))
                    left = b.add(values, b.mul(column.index, I64(32 * vectors)))
                    at = b.add(left, b.mul(row, I64(padded * 2)))
                    return [offset(b, at, 32 * v) for v in range(vectors)], []

                sums = _grid(b, b.add(out, b.mul(column.index, I64(64 * vectors))), 1, 0, vectors)
                _accumulate(b, sums, n, weights, 0, values_at, I64(0), False)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return made
