"""Quantized weights times many tokens.

A tile of 16 rows is unpacked once and stays in the caches while panels of tokens pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numba

from cpu_kernels import amx
from cpu_kernels.codes import TILE, fine_at, panel_bytes, panel_widths
from cpu_kernels.compile import Kernel, kernel, named, unpack
from cpu_kernels.finish import finish
from cpu_kernels.gemm_amx import tile_product, tile_state
from cpu_kernels.panel_product import by_width, fine_products, panel_product
from cpu_kernels.simd import add, load_f32, store_f32, zeros
from cpu_kernels.tiles import Layout
from cpu_kernels.unpacked import group_bytes, unpack_tile


def scratch_bytes(layout: Layout, inputs: int) -> int:
    """Memory that each thread needs: a panel's sums, those of its fine parts, and an unpacked tile."""
    return 2 * 64 * panel_widths()[0] + inputs // 32 * group_bytes(layout)


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
    unpacked_at = 2 * 64 * panel_widths()[0]
    unpack_row, multiply = unpack_tile(layout), panels_product(layout, tiles, label)
    configure, release = tile_state(layout, tiles)

    @kernel(f"gemm {label}")
    def gemm(arguments, tile, thread):
        (out, out_stride, weight, tile_bytes, n_tiles, each, panels, n_tokens, panels_each, inputs, last_width, bias,
         residual, residual_stride, scratch, scratch_each) = unpack(arguments, "iiiiiiiiiiiiiiii")  # fmt: skip
        across = (n_tiles + each - 1) // each
        first, first_panel = tile % across * each, tile // across * panels_each
        tokens = panels, n_tokens, last_width, inputs, first_panel, panels_each
        memory = scratch + thread * scratch_each
        configure()
        for row in range(first, min(first + each, n_tiles)):
            unpack_row(memory + unpacked_at, weight + row * tile_bytes, inputs // 32)
            extra = bias + row * 64 if bias != 0 else 0, residual + row * 64 if residual != 0 else 0, residual_stride
            multiply(out + row * 64, out_stride, tokens, memory, weight + (row + 1) * tile_bytes, extra)
        release()

    return gemm


@functools.cache
def panels_product(layout: Layout, tiles: amx.Tiles | None, label: str) -> Callable:
    """Numba function that multiplies panels with an unpacked tile.

    Args:
        layout: that the tile was unpacked from.
        tiles: for panels of 16, where there are any.
        label: unlike that of any other.

    Its arguments: out for the tile's rows and its stride; what tokens there are, a tuple: panels, number of tokens,
    width of the last panel, inputs, the first panel and how many; scratch memory, which holds the unpacked tile; the
    tile to fetch meanwhile; a tuple of bias, residual (0 for none) and its stride.
    """
    widths, fine_product = panel_widths(), fine_products(layout)
    widest = widths[0]
    products = {
        width: _alone(tile_product(layout, tiles), label) if width == TILE else panel_product(layout, width)
        for width in widths
    }
    product = by_width(products, label)

    @numba.njit(error_model="numpy")
    @named(label)
    def multiply(out, stride, tokens, memory, coming, extra):
        panels, n_tokens, last_width, inputs, first_panel, panels_each = tokens
        bias, residual, residual_stride = extra
        n_panels = (n_tokens + widest - 1) // widest
        sums, fine_sums, unpacked = memory, memory + 64 * widest, memory + 128 * widest
        for index in range(first_panel, min(first_panel + panels_each, n_panels)):
            panel = panels + index * panel_bytes(inputs, widest)
            width = last_width if index == n_panels - 1 else widest
            product(width, sums, unpacked, panel, inputs, coming)
            for t in range(width):
                store_f32(fine_sums + 64 * t, zeros())
            fine_product(fine_sums, unpacked, panel + fine_at(inputs, width))
            for t in range(min(width, n_tokens - index * widest)):
                y = add(load_f32(sums + 64 * t), load_f32(fine_sums + 64 * t))
                place = index * widest + t
                finish(y, out + place * stride, bias, residual + place * residual_stride if residual != 0 else 0)

    return multiply


def _alone(multiply, label: str):
    """A product that fetches nothing meanwhile: tile instructions serve prompts, whose weights are read once."""

    @numba.njit(error_model="numpy")
    @named(label)
    def product(sums, unpacked, panel, inputs, _coming):
        multiply(sums, unpacked, panel, inputs)

    return product
