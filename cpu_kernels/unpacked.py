"""A tile of 16 rows unpacked, whatever its format, to bytes and float scales: what products with panels read."""

from __future__ import annotations

import functools

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.simd import I64, offset
from cpu_kernels.tiles import Layout, gained, starting


def group_bytes(layout: Layout) -> int:
    """Bytes of 32 inputs: 8 vectors of codes, then scales by part, then the bias if any."""
    return 512 + 64 * (layout.parts + (not layout.symmetric))


@functools.cache
def unpack_tile(layout: Layout):
    """Intrinsic: unpacks the first groups of a tile of 16 rows."""

    @intrinsic
    def unpack_tile(context, unpacked, tile, groups):
        def codegen(ctx, b, signature, args):
            unpacked, tile, groups = args
            with cgutils.for_range(b, groups) as loop:
                _unpack_group(b, layout, unpacked, loop.index, tile, loop.index)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    return unpack_tile


@functools.cache
def unpack_listed(layout: Layout):
    """Intrinsic: unpacks those groups of a tile of 16 rows that a list [int32] has, side by side."""

    @intrinsic
    def unpack_listed(context, unpacked, tile, listed, count):
        def codegen(ctx, b, signature, args):
            unpacked, tile, listed, count = args
            with cgutils.for_range(b, count) as loop:
                group = simd.i32_at.build(b, b.add(listed, b.mul(loop.index, I64(4))))
                _unpack_group(b, layout, unpacked, loop.index, tile, group)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return unpack_listed


def _unpack_group(b, layout, unpacked, index, tile, group):
    """32 inputs of a tile become those of number `index` in an unpacked one."""
    address, scales, bias = layout.group(b, tile, group)
    at = b.add(unpacked, b.mul(index, I64(group_bytes(layout))))
    for j, code in enumerate(layout.codes(b, address)):
        b.store(code, simd.pointer(b, offset(b, at, 64 * j), simd.B.llvm), align=4)
    for i, number in enumerate([*scales, bias] if bias is not None else scales):
        simd.store_f32.build(b, offset(b, at, 512 + 64 * i), number)


# What follows writes LLVM IR. `number` is where a panel holds the first token's scale of a group; the other numbers of
# a token are each `block` bytes on.


def start_of_token(b, layout, number, block, token):
    """Where a token's integer sums of a group start, by part."""
    sums_at = b.add(offset(b, number, 4 * token), b.mul(block, I64(2)))
    return starting(b, layout, sums_at, b.add(sums_at, block))


def gain(b, layout, group, number, block, totals, sums):
    """Adds a group's products to the totals of a panel's tokens.

    Args:
        group: address of the group in the unpacked tile.
        totals: pointer to each token's 16 totals.
        sums: each token's integer sums by part.
    """
    scales = [simd.load_f32.build(b, offset(b, group, 512 + 64 * i)) for i in range(layout.parts)]
    bias = None if layout.symmetric else simd.load_f32.build(b, offset(b, group, 512 + 64 * layout.parts))
    for token, (total, products) in enumerate(zip(totals, sums)):
        here = offset(b, number, 4 * token)
        value = gained(b, b.load(total), products, simd.splat_f32_at.build(b, here), scales)
        if bias is not None:
            value = simd.fma.build(b, bias, simd.splat_f32_at.build(b, b.add(here, block)), value)
        b.store(value, total)
