"""An unpacked tile of weights times a panel of 16 tokens, by Intel's tile instructions (AMX).

32 inputs of an unpacked tile of weights are as such the unsigned side of a tile product, and those of a panel of 16
tokens the signed side. Their sums are integers and exact. They go through memory to the vectors, which do with floats
what `gemm` does, in the same order: results are the same to the last bit.

Two groups of inputs take turns: while vectors finish one, the tile unit multiplies the next.

A block of 16 rows, 16 tokens and 32 inputs should keep the tile unit busy for 16 cycles (a cycle a row of the signed
side) and the store port for 16 (the rows of sums). The vectors convert, multiply and add 16 times, 64 operations with
biases, two a cycle: 32 cycles, which is what they take. But the tile part takes some 55, and the two do not overlap: no
more is gained by storing sums several groups ahead. Byte products of vectors take 128 operations, 64 cycles, on top of
those 32, so both ways are about as fast. Loading tiles half as often, for two by two blocks, would be next to try.
"""

from __future__ import annotations

import functools

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.amx import Tiles
from cpu_kernels.codes import TILE
from cpu_kernels.simd import I8, I64, VOID, offset, op
from cpu_kernels.tiles import Layout
from cpu_kernels.unpacked import gain, group_bytes, start_of_token

SUMS, TOKENS, ROWS = 0, 4, 6
"""Numbers of the first tile of integer sums (one for each of two groups and part), of tokens and of rows (two each)."""
SUM_BYTES = 1024


def shapes(layout: Layout) -> dict[int, tuple[int, int]]:
    """The tiles that products with a layout use: rows, and bytes of a row."""
    made = {SUMS + i: (TILE, 64) for i in range(2 * layout.parts)}
    for i in range(2):
        made[TOKENS + i] = TILE, 32 // layout.parts
        made[ROWS + i] = 8 // layout.parts, 64
    return made


def build_product(b, layout, tiles, out, unpacked, panel, inputs):
    """Builds the product of an unpacked tile with a panel; stores 16 sums for each token, without their fine parts."""
    groups = b.lshr(inputs, I64(5))
    block = b.mul(groups, I64(4 * TILE))
    numbers = b.add(panel, b.mul(inputs, I64(TILE)))
    totals = [cgutils.alloca_once_value(b, simd.floats(0)) for _ in range(TILE)]
    sums = _memory(b, 2 * layout.parts * SUM_BYTES)

    def multiply(group, turn):
        rows = b.add(unpacked, b.mul(group, I64(group_bytes(layout))))
        tokens = b.add(panel, b.mul(group, I64(32 * TILE)))
        for part in range(layout.parts):
            unit = turn * layout.parts + part
            mine = SUMS + unit, TOKENS + unit % 2, ROWS + unit % 2
            tiles.zero(b, mine[0])
            tiles.load(b, mine[1], offset(b, tokens, 16 * part), 32)
            tiles.load(b, mine[2], offset(b, rows, 256 * part), 64)
            tiles.dot(b, *mine)
            tiles.store(b, mine[0], offset(b, sums, SUM_BYTES * unit), 64)

    def finish(group, turn):
        rows = b.add(unpacked, b.mul(group, I64(group_bytes(layout))))
        number = b.add(numbers, b.mul(group, I64(4 * TILE)))

        def of_token(token):
            starts = start_of_token(b, layout, number, block, token)
            places = (SUM_BYTES * (turn * layout.parts + part) + 64 * token for part in range(layout.parts))
            loaded = (b.load(simd.pointer(b, offset(b, sums, at), simd.I.llvm), align=64) for at in places)
            return [b.add(start, integers) for start, integers in zip(starts, loaded)]

        gain(b, layout, rows, number, block, totals, (of_token(token) for token in range(TILE)))

    last = b.sub(groups, I64(1))
    multiply(I64(0), 0)
    with cgutils.for_range(b, b.lshr(groups, I64(1))) as loop:
        first = b.shl(loop.index, I64(1))
        multiply(offset(b, first, 1), 1)
        finish(first, 0)
        following = offset(b, first, 2)
        # After an even number of groups this multiplies the last once more, for nobody.
        multiply(b.select(b.icmp_signed("<", following, last), following, last), 0)
        finish(offset(b, first, 1), 1)
    with b.if_then(b.trunc(groups, ir.IntType(1))):
        finish(last, 0)
    for token, total in enumerate(totals):
        simd.store_f32.build(b, offset(b, out, 64 * token), b.load(total))


def _memory(b, size):
    """Address of memory of the function's own, aligned to cache lines. Nothing is written to it."""
    with b.goto_entry_block():
        place = b.alloca(ir.ArrayType(I8, size))
        place.align = 64
        return b.ptrtoint(place, I64)


@functools.cache
def tile_product(layout: Layout, tiles: Tiles):
    """Intrinsic: an unpacked tile times a panel of 16 tokens."""

    @intrinsic
    def tile_product(context, out, unpacked, panel, inputs):
        def codegen(ctx, b, signature, args):
            build_product(b, layout, tiles, *args)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return tile_product


@functools.cache
def tile_state(layout: Layout, tiles: Tiles | None):
    """Intrinsics for before the first product and after the last of a piece of work; they do nothing without tiles."""

    @op(VOID())
    def configure(b):
        if tiles is not None:
            tiles.configure(b, shapes(layout))

    @op(VOID())
    def release(b):
        if tiles is not None:
            tiles.release(b)

    return configure, release
