"""Quantized weights times one token."""

from __future__ import annotations

import functools

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.codes import FINE_GROUP, HALF_SUM, PLANE, SCALE, SUM
from cpu_kernels.compile import Kernel, kernel, unpack
from cpu_kernels.finish import finish
from cpu_kernels.simd import I64, F, offset
from cpu_kernels.tiles import Layout, dots, gained, starting


@functools.cache
def row_tile(layout: Layout):
    """Intrinsic: one tile of 16 rows times a panel of width 1 -> 16 sums."""

    @intrinsic
    def tile_product(context, tile, panel, inputs):
        def codegen(ctx, b, signature, args):
            tile, panel, inputs = args
            groups = b.lshr(inputs, I64(5))
            block = b.mul(groups, I64(4))
            numbers = b.add(panel, inputs)
            total = cgutils.alloca_once_value(b, simd.floats(0))
            with cgutils.for_range(b, groups) as loop:
                address, scales, bias = layout.group(b, tile, loop.index)
                number = b.add(numbers, b.mul(loop.index, I64(4)))
                sums_at = b.add(number, b.mul(block, I64(2)))
                starts = starting(b, layout, sums_at, b.add(sums_at, block))
                quads = b.add(panel, b.mul(loop.index, I64(32)))
                products = dots(b, layout, layout.codes(b, address), quads, 4, starts)
                value = gained(b, b.load(total), products, simd.splat_f32_at.build(b, number), scales)
                if bias is not None:
                    value = simd.fma.build(b, bias, simd.splat_f32_at.build(b, b.add(number, block)), value)
                b.store(value, total)
            fine = b.add(numbers, b.mul(block, I64(4)))
            rest = _fine_groups(b, layout, tile, fine)
            return b.fadd(b.load(total), rest)

        return F(*[types.int64] * 3), codegen

    return tile_product


def _fine_groups(b, layout, tile, fine):
    """What the second planes of a token's fine groups add."""
    total = cgutils.alloca_once_value(b, simd.floats(0))
    with cgutils.for_range(b, simd.i64_at.build(b, fine)) as loop:
        entry = b.add(offset(b, fine, 64), b.mul(loop.index, I64(FINE_GROUP)))
        address, scales, _ = layout.group(b, tile, simd.i32_at.build(b, entry))
        starts = starting(b, layout, offset(b, entry, SUM), offset(b, entry, HALF_SUM))
        products = dots(b, layout, layout.codes(b, address), offset(b, entry, PLANE), 4, starts)
        scale = simd.splat_f32_at.build(b, offset(b, entry, SCALE))
        b.store(gained(b, b.load(total), products, scale, scales), total)
    return b.load(total)


@functools.cache
def gemv(layout: Layout) -> Kernel:
    """Kernel: out = W x (+ bias) (+ residual) for one token.

    Args:
        layout: of the weights' tiles.

    Its arguments: out, weight, bytes of a tile, number of tiles, tiles of one piece of work, panel and bytes between
    the panels of threads, inputs, bias and residual (0 for none).
    """
    tile_product = row_tile(layout)

    @kernel(f"gemv {layout.label}")
    def gemv(arguments, tile, thread):
        out, weight, tile_bytes, n_tiles, each, panel, thread_bytes, inputs, bias, residual = unpack(
            arguments, "iiiiiiiiii"
        )
        here = panel + thread * thread_bytes
        for row in range(tile * each, min(tile * each + each, n_tiles)):
            y = tile_product(weight + row * tile_bytes, here, inputs)
            finish(y, out + row * 64, bias + row * 64 if bias != 0 else 0, residual + row * 64 if residual != 0 else 0)

    return gemv
