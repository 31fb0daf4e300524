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


def side_by_side(rows: int, available: int) -> int:
    """How many vectors share a loop of so many rows: at most 5, a divisor of those available.

    Each product costs a part of a factor's load and a part of a vector's load and conversion.
    """

    def cost(vectors: int) -> float:
        return 1 / vectors + 2 / max(n for _, n in _slices(rows, vectors))

    fitting = [v for v in range(1, 6) if available % v == 0 and (v == 1 or _fits(1, v))]
    return min(fitting, key=cost)


def _slices(rows: int, vectors: int) -> list[tuple[int, int]]:
    """(first row, rows) of near-equal parts that fit."""
    most = max(r for r in range(1, rows + 1) if r == 1 or _fits(r, vectors))
    parts = -(-rows // most)
    starts = [i * rows // parts for i in range(parts + 1)]
    return [(start, end - start) for start, end in zip(starts, starts[1:])]


def _sums(b, rows, vectors, load=None):
    """Registers [rows][vectors], of zeros or loaded from addresses."""
    made = [[cgutils.alloca_once(b, simd.F.llvm) for _ in range(vectors)] for _ in range(rows)]
    for r, row in enumerate(made):
        for v, slot in enumerate(row):
            b.store(simd.floats(0) if load is None else simd.load_f32.build(b, load[r][v]), slot)
    return made


def _accumulate(b, sums, factors, vectors):
    """sums[row][i] += factor at address [row] * vectors[i]."""
    for row, where in zip(sums, factors):
        factor = simd.splat_f32_at.build(b, where)
        for slot, vector in zip(row, vectors):
            b.store(simd.fma.build(b, vector, factor, b.load(slot)), slot)


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
            for first, n in _slices(rows, blocks):
                sums = _sums(b, n, blocks)
                with cgutils.for_range(b, I64(head_dim)) as loop:
                    at = b.add(keys, b.mul(loop.index, I64(32)))
                    if not first:
                        soon = b.add(ahead, b.mul(loop.index, I64(32 * blocks)))
                        for line in range(0, 32 * blocks, 64):
                            simd.prefetch_l2.build(b, offset(b, soon, line))
                    key = [simd.load_f16.build(b, offset(b, at, i * block_bytes)) for i in range(blocks)]
                    query = b.add(queries, b.mul(loop.index, I64(4)))
                    _accumulate(b, sums, [offset(b, query, (first + r) * query_stride) for r in range(n)], key)
                for r, row in enumerate(sums):
                    for i, slot in enumerate(row):
                        simd.store_f32.build(b, offset(b, out, (first + r) * score_stride + 64 * i), b.load(slot))
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
    row_bytes = padded * 2

    @intrinsic
    def made(context, out, weights, values, ahead, n):
        def codegen(ctx, b, signature, args):
            out, weights, values, ahead, n = args
            for first, some in _slices(rows, vectors):
                for column in range(0, across, vectors):
                    place = [
                        [offset(b, out, (first + r) * result_stride + 64 * (column + i)) for i in range(vectors)]
                        for r in range(some)
                    ]
                    sums = _sums(b, some, vectors, place)
                    with cgutils.for_range(b, n) as loop:
                        row = b.mul(loop.index, I64(row_bytes))
                        if not first and not column:
                            for line in range(0, row_bytes, 64):
                                simd.prefetch_l2.build(b, offset(b, b.add(ahead, row), line))
                        at = offset(b, b.add(values, row), 32 * column)
                        value = [simd.load_f16.build(b, offset(b, at, 32 * i)) for i in range(vectors)]
                        weight = b.add(weights, b.mul(loop.index, I64(4)))
                        _accumulate(b, sums, [offset(b, weight, (first + r) * weight_stride) for r in range(some)], value)
                    for slots, addresses in zip(sums, place):
                        for slot, address in zip(slots, addresses):
                            simd.store_f32.build(b, address, b.load(slot))
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return made
