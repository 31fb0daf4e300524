"""A feed-forward layer of which one token needs some blocks, each of a multiple of 32 neurons.

The weights of gate and up are tiles as elsewhere, those of 32 neurons together: the two tiles of gate, then the two of
up. Those of down are tiles in bands. Neither reads a byte of the neurons left out; what they compute is to the last bit
what the whole layer gives if the activations left out are 0.
"""

from __future__ import annotations

import functools

import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.codes import FINE_GROUP, HALF_SUM, PLANE, SCALE, SUM
from cpu_kernels.compile import Kernel, kernel, unpack
from cpu_kernels.finish import finish
from cpu_kernels.gemv import row_tile
from cpu_kernels.rows import activate
from cpu_kernels.simd import I64, add, load_f32, mul, offset, store_f32
from cpu_kernels.table import HEADER, entry_count, first_entry, group_of
from cpu_kernels.tiles import Layout, dots, gained, starting

MODES = ("gated", "plain", "valued")
"""act(gate x) * up x; act(up x); value * up x."""
AHEAD = 3
"""Entries between one that is multiplied with a band of down and one that is fetched. Where entries follow each other
in memory, the CPU's own prefetching does better than any of ours."""
FIRST_BYTES = 4096
"""Of the next entry of gate and up, if it is elsewhere: what the CPU has no way of knowing."""


@functools.cache
def blocks_up(layout: Layout, mode: str) -> Kernel:
    """Kernel: activations of the chosen neurons, for one token.

    Args:
        layout: of the weights' tiles.
        mode: one of MODES.

    Its arguments: out, table, weight, bytes of a tile, pieces of work, panel and bytes between the panels of threads,
    inputs, biases in the order of the weights' rows (0 for none), which activation, and the values of all neurons.
    """
    product = row_tile(layout)
    gated, valued, tiles = mode == "gated", mode == "valued", 4 if mode == "gated" else 2

    @numba.njit(error_model="numpy")
    def pair(weight, tile_bytes, panel, inputs, bias):
        y0, y1 = product(weight, panel, inputs), product(weight + tile_bytes, panel, inputs)
        if bias != 0:
            y0, y1 = add(y0, load_f32(bias)), add(y1, load_f32(bias + 64))
        return y0, y1

    @numba.njit(error_model="numpy")
    def fetch(start):
        for line in range(start, start + FIRST_BYTES, 64):
            simd.prefetch_l2(line)

    @kernel(f"blocks up {mode} {layout.label}")
    def blocks_up(arguments, tile, thread):
        out, table, weight, tile_bytes, pieces, panel, each, inputs, biases, kind, values = unpack(
            arguments, "iiiiiiiiiii"
        )
        here, last = panel + thread * each, entry_count(table) - 1
        for entry in range(first_entry(table, tile, pieces), first_entry(table, tile + 1, pieces)):
            group = group_of(table, entry)
            at, bias = weight + group * tiles * tile_bytes, biases + group * tiles * 64 if biases != 0 else 0
            following = group_of(table, min(entry + 1, last))
            if following > group + 1:
                fetch(weight + following * tiles * tile_bytes)
            # In the order in which they lie in memory.
            h0, h1 = pair(at, tile_bytes, here, inputs, bias)
            h0, h1 = activate(h0, kind), activate(h1, kind)
            if valued:
                h0, h1 = mul(load_f32(values + group * 128), h0), mul(load_f32(values + group * 128 + 64), h1)
            if gated:
                u0, u1 = pair(at + 2 * tile_bytes, tile_bytes, here, inputs, bias + 128 if biases != 0 else 0)
                h0, h1 = mul(h0, u0), mul(h1, u1)
            store_f32(out + entry * 128, h0)
            store_f32(out + entry * 128 + 64, h1)

    return blocks_up


@functools.cache
def _band_product(layout: Layout):
    """Intrinsic: a band of tiles times the listed groups of a panel of width 1; stores 16 sums for each tile."""

    @intrinsic
    def band_product(context, out, band, groups, count, panel):
        def codegen(ctx, b, signature, args):
            out, band, groups, count, panel = args
            firsts = _first_planes(b, layout, band, groups, count, panel)
            rests = _second_planes(b, layout, band, groups, count, panel)
            for r, (first, rest) in enumerate(zip(firsts, rests)):
                simd.store_f32.build(b, offset(b, out, 64 * r), b.fadd(b.load(first), b.load(rest)))
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return band_product


def _totals(b, layout):
    return [cgutils.alloca_once_value(b, simd.floats(0)) for _ in range(layout.band)]


def _group_at(b, groups, entry):
    return simd.i32_at.build(b, b.add(groups, b.mul(entry, I64(4))))


def _coming(b, groups, entry, count, group):
    """The group to fetch while one is multiplied; that group itself if the CPU fetches what follows on its own."""
    last, later = b.sub(count, I64(1)), b.add(entry, I64(AHEAD))
    coming = _group_at(b, groups, b.select(b.icmp_signed("<", later, last), later, last))
    return b.select(b.icmp_signed("==", coming, b.add(group, I64(AHEAD))), group, coming)


def _first_planes(b, layout, band, groups, count, panel):
    """Sums of all tiles, from the first planes."""
    totals = _totals(b, layout)
    block = b.mul(count, I64(4))
    numbers = b.add(panel, b.mul(count, I64(32)))
    with cgutils.for_range(b, count) as loop:
        group = _group_at(b, groups, loop.index)
        coming = _coming(b, groups, loop.index, count, group)
        number = b.add(numbers, b.mul(loop.index, I64(4)))
        sums_at = b.add(number, b.mul(block, I64(2)))
        starts = starting(b, layout, sums_at, b.add(sums_at, block))
        quads = b.add(panel, b.mul(loop.index, I64(32)))
        scale, both = simd.splat_f32_at.build(b, number), simd.splat_f32_at.build(b, b.add(number, block))
        for r, total in enumerate(totals):
            tile = offset(b, band, r * layout.group_bytes)
            address, scales, bias = layout.group(b, tile, group)
            for line in range(0, min(layout.group_bytes, 64 * layout.bits + 128), 64):
                simd.prefetch_l2.build(b, offset(b, layout.group(b, tile, coming)[0], line))
            codes = layout.codes(b, address, 0)
            value = gained(b, b.load(total), dots(b, layout, codes, quads, 4, starts), scale, scales)
            if bias is not None:
                value = simd.fma.build(b, bias, both, value)
            b.store(value, total)
    return totals


def _second_planes(b, layout, band, groups, count, panel):
    """What the second planes of the fine groups add."""
    totals = _totals(b, layout)
    fine = b.add(panel, b.mul(count, I64(48)))
    with cgutils.for_range(b, simd.i64_at.build(b, fine)) as loop:
        entry = b.add(offset(b, fine, 64), b.mul(loop.index, I64(FINE_GROUP)))
        group = _group_at(b, groups, simd.i32_at.build(b, entry))
        starts = starting(b, layout, offset(b, entry, SUM), offset(b, entry, HALF_SUM))
        scale = simd.splat_f32_at.build(b, offset(b, entry, SCALE))
        for r, total in enumerate(totals):
            address, scales, _ = layout.group(b, offset(b, band, r * layout.group_bytes), group)
            codes = layout.codes(b, address, 0)
            products = dots(b, layout, codes, offset(b, entry, PLANE), 4, starts)
            b.store(gained(b, b.load(total), products, scale, scales), total)
    return totals


@functools.cache
def blocks_down(layout: Layout) -> Kernel:
    """Kernel: out = W h (+ bias) (+ residual) for one token; a piece of work is a band of tiles.

    Args:
        layout: of the weights' tiles.

    Its arguments: out, table, weight, bytes of a band, panel and bytes between the panels of threads, bias and residual
    (0 for none).
    """
    product = _band_product(layout)
    band = layout.band

    @kernel(f"blocks down {layout.label}")
    def blocks_down(arguments, tile, thread):
        out, table, weight, band_bytes, panel, each, bias, residual = unpack(arguments, "iiiiiiii")
        first = tile * band * 64
        y = out + first
        product(y, weight + tile * band_bytes, table + HEADER, entry_count(table), panel + thread * each)
        for at in range(0, band * 64, 64):
            b, r = bias + first + at if bias != 0 else 0, residual + first + at if residual != 0 else 0
            finish(load_f32(y + at), y + at, b, r)

    return blocks_down
