"""An unpacked tile of weights times a panel of tokens, by vectors. The panel's sums stay in registers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.codes import FINE_GROUP, HALF_SUM, PLANE, SCALE, SUM
from cpu_kernels.compile import named
from cpu_kernels.integer_dots import instruction_set, integer_dots
from cpu_kernels.simd import I64, offset
from cpu_kernels.tiles import Layout, dots, gained, starting
from cpu_kernels.unpacked import gain, group_bytes, start_of_token


@functools.cache
def panel_product(layout: Layout, width: int):
    """Intrinsic: an unpacked tile times a panel; stores 16 sums for each of its tokens, without their fine parts.

    Meanwhile it fetches another tile: between one unpacking and the next, memory would have nothing to do.
    """

    @intrinsic
    def product(context, out, unpacked, panel, inputs, coming):
        def codegen(ctx, b, signature, args):
            out, unpacked, panel, inputs, coming = args
            totals = [cgutils.alloca_once_value(b, simd.floats(0)) for _ in range(width)]
            nbytes = layout.group_bytes * 32 // layout.group_size

            def fetch(group):
                for line in range(0, nbytes, 64):
                    simd.prefetch_l2.build(b, offset(b, b.add(coming, b.mul(group, I64(nbytes))), line))

            _multiply(b, layout, totals, unpacked, panel, inputs, fetch)
            for t in range(width):
                simd.store_f32.build(b, offset(b, out, 64 * t), b.load(totals[t]))
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return product


@functools.cache
def scattered_product(layout: Layout, width: int):
    """Intrinsic: an unpacked tile times a panel, added to 16 sums of each token, without their fine parts.

    Its arguments: sums and bytes between those of tokens, the tokens' numbers [int32], unpacked tile, panel and inputs.
    """

    @intrinsic
    def product(context, sums, stride, tokens, unpacked, panel, inputs):
        def codegen(ctx, b, signature, args):
            sums, stride, tokens, unpacked, panel, inputs = args
            numbers = [simd.i32_at.build(b, offset(b, tokens, 4 * t)) for t in range(width)]
            places = [b.add(sums, b.mul(number, stride)) for number in numbers]
            totals = [cgutils.alloca_once_value(b, simd.load_f32.build(b, place)) for place in places]
            _multiply(b, layout, totals, unpacked, panel, inputs)
            for place, total in zip(places, totals):
                simd.store_f32.build(b, place, b.load(total))
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return product


def _multiply(b, layout, totals, unpacked, panel, inputs, fetch=None):
    """Adds a panel's products to the totals of its tokens. fetch: builds what is fetched with each group."""
    width = len(totals)
    multiply = _vector_by_vector if instruction_set() == "vnni512" else _token_by_token
    groups = b.lshr(inputs, I64(5))
    block = b.mul(groups, I64(4 * width))
    numbers = b.add(panel, b.mul(inputs, I64(width)))
    with cgutils.for_range(b, groups) as loop:
        at = b.add(unpacked, b.mul(loop.index, I64(group_bytes(layout))))
        quads = b.add(panel, b.mul(loop.index, I64(32 * width)))
        number = b.add(numbers, b.mul(loop.index, I64(4 * width)))
        starts = [start_of_token(b, layout, number, block, t) for t in range(width)]
        sums = multiply(b, layout, at, quads, starts)
        gain(b, layout, at, number, block, totals, sums)
        if fetch is not None:
            fetch(loop.index)


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
def fine_products(layout: Layout):
    """Intrinsic: adds to 16 sums of each token what the second planes of a panel's fine groups give.

    Codes are loaded once for tokens that follow each other with the same group.
    """

    @intrinsic
    def products(context, sums, unpacked, fine):
        def codegen(ctx, b, signature, args):
            sums, unpacked, fine = args
            first = offset(b, fine, 64)
            end = b.add(first, b.mul(simd.i64_at.build(b, fine), I64(FINE_GROUP)))
            current = cgutils.alloca_once_value(b, first)
            load, add, more, done = (b.append_basic_block(f"fine.{name}") for name in ("load", "add", "more", "done"))
            b.cbranch(b.icmp_signed("<", first, end), load, done)
            b.position_at_end(load)
            group = simd.i32_at.build(b, b.load(current))
            at = b.add(unpacked, b.mul(group, I64(group_bytes(layout))))
            codes = [simd.load_bytes.build(b, offset(b, at, 64 * j)) for j in range(8)]
            scales = [simd.load_f32.build(b, offset(b, at, 512 + 64 * i)) for i in range(layout.parts)]
            b.branch(add)
            b.position_at_end(add)
            entry = b.load(current)
            starts = starting(b, layout, offset(b, entry, SUM), offset(b, entry, HALF_SUM))
            products = dots(b, layout, codes, offset(b, entry, PLANE), 4, starts)
            scale = simd.splat_f32_at.build(b, offset(b, entry, SCALE))
            place = b.add(sums, b.mul(simd.i32_at.build(b, offset(b, entry, 4)), I64(64)))
            simd.store_f32.build(b, place, gained(b, simd.load_f32.build(b, place), products, scale, scales))
            following = offset(b, entry, FINE_GROUP)
            b.store(following, current)
            b.cbranch(b.icmp_signed("<", following, end), more, done)
            b.position_at_end(more)
            b.cbranch(b.icmp_signed("==", simd.i32_at.build(b, following), group), add, load)
            b.position_at_end(done)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    return products


def by_width(products: dict[int, Any], label: str) -> Callable:
    """Numba function (width, *arguments) that calls the product for panels of that width.

    Args:
        products: by width, three or only one.
        label: unlike that of any other.
    """
    if len(products) == 1:
        (only,) = products.values()

        @numba.njit(error_model="numpy")
        @named(label)
        def product(width, *arguments):
            only(*arguments)
    else:
        widest, middle, narrow = products.values()
        first, second, _third = products

        @numba.njit(error_model="numpy")
        @named(label)
        def product(width, *arguments):
            if width == first:
                widest(*arguments)
            elif width == second:
                middle(*arguments)
            else:
                narrow(*arguments)

    return product
