"""Quantized weights times many tokens.

A tile of 16 rows is unpacked once and stays in the caches while panels of tokens pass. A panel's sums stay in registers
from the first input to the last.
"""

from __future__ import annotations

import functools

import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import amx, simd
from cpu_kernels.codes import FINE_GROUP, HALF_SUM, PLANE, SCALE, SUM, TILE, fine_at, panel_bytes, panel_widths
from cpu_kernels.compile import Kernel, kernel, named, unpack
from cpu_kernels.finish import finish
from cpu_kernels.gemm_amx import tile_product, tile_state
from cpu_kernels.integer_dots import instruction_set, integer_dots
from cpu_kernels.simd import I64, add, load_f32, offset, store_f32, zeros
from cpu_kernels.tiles import Layout, dots, gained, starting
from cpu_kernels.unpacked import gain, group_bytes, start_of_token, unpack_tile


def scratch_bytes(layout: Layout, inputs: int) -> int:
    """Memory that each thread needs: a panel's sums, those of its fine parts, and an unpacked tile."""
    return 2 * 64 * panel_widths()[0] + inputs // 32 * group_bytes(layout)


@functools.cache
def _panel_product(layout: Layout, width: int):
    """Intrinsic: an unpacked tile times a panel; stores 16 sums for each of its tokens, without their fine parts.

    Meanwhile it fetches another tile: between one unpacking and the next, memory would have nothing to do.
    """
    multiply = _vector_by_vector if instruction_set() == "vnni512" else _token_by_token

    @intrinsic
    def panel_product(context, out, unpacked, panel, inputs, coming):
        def codegen(ctx, b, signature, args):
            out, unpacked, panel, inputs, coming = args
            groups = b.lshr(inputs, I64(5))
            block = b.mul(groups, I64(4 * width))
            numbers = b.add(panel, b.mul(inputs, I64(width)))
            totals = [cgutils.alloca_once_value(b, simd.floats(0)) for _ in range(width)]
            with cgutils.for_range(b, groups) as loop:
                at = b.add(unpacked, b.mul(loop.index, I64(group_bytes(layout))))
                quads = b.add(panel, b.mul(loop.index, I64(32 * width)))
                number = b.add(numbers, b.mul(loop.index, I64(4 * width)))
                starts = [start_of_token(b, layout, number, block, t) for t in range(width)]
                sums = multiply(b, layout, at, quads, starts)
                gain(b, layout, at, number, block, totals, sums)
                nbytes = layout.group_bytes * 32 // layout.group_size
                for line in range(0, nbytes, 64):
                    simd.prefetch_l2.build(b, offset(b, b.add(coming, b.mul(loop.index, I64(nbytes))), line))
            for t in range(width):
                simd.store_f32.build(b, offset(b, out, 64 * t), b.load(totals[t]))
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return panel_product


def _token_by_token(b, layout, unpacked, quads, starts):
    """Integer products of 32 inputs of each token, one after the other: for CPUs with few registers."""
    codes = [simd.load_bytes.build(b, offset(b, unpacked, 64 * j)) for j in range(8)]
    width = len(starts)
    return [dots(b, layout, codes, offset(b, quads, 4 * t), 4 * width, starts[t]) for t in range(width)]


def _vector_by_vector(b, layout, unpacked, quads, starts):
    """The same, each vector of codes read once for all tokens, whose sums need not wait for each other."""
    sums, width = [list(s) for s in starts], len(starts)
    for j in range(8):
        code, part = simd.load_bytes.build(b, offset(b, unpacked, 64 * j)), j * layout.parts // 8
        for t in range(width):
            quad = simd.splat_quad.build(b, offset(b, quads, 4 * (width * j + t)))
            sums[t][part] = integer_dots(b, sums[t][part], [code], [quad], layout.bits)
    return sums


@functools.cache
def _fine_products(layout: Layout):
    """Intrinsic: adds to 16 sums of each token what the second planes of a panel's fine groups give."""

    @intrinsic
    def fine_products(context, sums, unpacked, fine):
        def codegen(ctx, b, signature, args):
            sums, unpacked, fine = args
            with cgutils.for_range(b, simd.i64_at.build(b, fine)) as loop:
                entry = b.add(offset(b, fine, 64), b.mul(loop.index, I64(FINE_GROUP)))
                at = b.add(unpacked, b.mul(simd.i32_at.build(b, entry), I64(group_bytes(layout))))
                codes = [simd.load_bytes.build(b, offset(b, at, 64 * j)) for j in range(8)]
                scales = [simd.load_f32.build(b, offset(b, at, 512 + 64 * i)) for i in range(layout.parts)]
                starts = starting(b, layout, offset(b, entry, SUM), offset(b, entry, HALF_SUM))
                products = dots(b, layout, codes, offset(b, entry, PLANE), 4, starts)
                scale = simd.splat_f32_at.build(b, offset(b, entry, SCALE))
                place = b.add(sums, b.mul(simd.i32_at.build(b, offset(b, entry, 4)), I64(64)))
                simd.store_f32.build(b, place, gained(b, simd.load_f32.build(b, place), products, scale, scales))
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    return fine_products


def gemm(layout: Layout) -> Kernel:
    """Kernel: out = tokens x W^T (+ bias) (+ residual), for tokens in panels.

    Args:
        layout: of the weights' tiles.

    Its arguments: out and its stride, weight, bytes of a tile, number of tiles, tiles of one piece of work, panels,
    number of tokens, panels of one piece of work, inputs, width of the last panel, bias, residual (0 for none) and its
    stride, scratch memory and bytes of it for each thread.
    """
    return _gemm(layout, amx.tiles())


@functools.cache
def _gemm(layout: Layout, tiles: amx.Tiles | None) -> Kernel:
    label = f"{layout.label} {tiles.name}" if tiles else layout.label
    widths = panel_widths()
    widest = widths[0]
    unpack_row, fine_products = unpack_tile(layout), _fine_products(layout)
    product = _by_width(layout, widths, tiles, label)
    configure, release = tile_state(layout, tiles)

    @kernel(f"gemm {label}")
    def gemm(arguments, tile, thread):
        (out, out_stride, weight, tile_bytes, n_tiles, each, panels, n_tokens, panels_each, inputs, last_width, bias,
         residual, residual_stride, scratch, scratch_each) = unpack(arguments, "iiiiiiiiiiiiiiii")  # fmt: skip
        across = (n_tiles + each - 1) // each
        first, first_panel = tile % across * each, tile // across * panels_each
        n_panels = (n_tokens + widest - 1) // widest
        sums = scratch + thread * scratch_each
        fine_sums = sums + 64 * widest
        unpacked = fine_sums + 64 * widest
        configure()
        for row in range(first, min(first + each, n_tiles)):
            unpack_row(unpacked, weight + row * tile_bytes, inputs // 32)
            for index in range(first_panel, min(first_panel + panels_each, n_panels)):
                panel = panels + index * panel_bytes(inputs, widest)
                width = last_width if index == n_panels - 1 else widest
                product(sums, unpacked, panel, inputs, weight + (row + 1) * tile_bytes, width)
                for t in range(width):
                    store_f32(fine_sums + 64 * t, zeros())
                fine_products(fine_sums, unpacked, panel + fine_at(inputs, width))
                for t in range(min(width, n_tokens - index * widest)):
                    y = add(load_f32(sums + 64 * t), load_f32(fine_sums + 64 * t))
                    place = index * widest + t
                    r = residual + place * residual_stride + row * 64 if residual != 0 else 0
                    finish(y, out + place * out_stride + row * 64, bias + row * 64 if bias != 0 else 0, r)
        release()

    return gemm


def _by_width(layout: Layout, widths: tuple[int, ...], tiles: amx.Tiles | None, label: str):
    """Numba function that multiplies a panel of one of the widths."""
    products = [_alone(tile_product(layout, tiles), label) if w == TILE else _panel_product(layout, w) for w in widths]
    if len(widths) == 1:
        (only,) = products

        @numba.njit(error_model="numpy")
        @named(label)
        def product(sums, unpacked, panel, inputs, coming, width):
            only(sums, unpacked, panel, inputs, coming)
    else:
        widest, middle, narrow = products
        first, second, _third = widths

        @numba.njit(error_model="numpy")
        @named(label)
        def product(sums, unpacked, panel, inputs, coming, width):
            if width == first:
                widest(sums, unpacked, panel, inputs, coming)
            elif width == second:
                middle(sums, unpacked, panel, inputs, coming)
            else:
                narrow(sums, unpacked, panel, inputs, coming)

    return product


def _alone(multiply, label: str):
    """A product that fetches nothing meanwhile: tile instructions serve prompts, whose weights are read once."""

    @numba.njit(error_model="numpy")
    @named(label)
    def product(sums, unpacked, panel, inputs, _coming):
        multiply(sums, unpacked, panel, inputs)

    return product
