"""A feed-forward layer of which each of many tokens needs its own experts, blocks of 32k neurons.

An expert's weights are unpacked once for all tokens that need it. First each expert gives its tokens activations; then
these are rounded, those of an expert side by side; then, for each 16 outputs, the experts add to their tokens in
ascending order, which is the order in which a single token adds them up: results are the same to the last bit.
"""

from __future__ import annotations

import functools

import numba

from cpu_kernels.codes import (
    clear_token,
    fine_at,
    panel_bytes,
    quantize_group,
    root_mean_square,
    vector_widths,
)
from cpu_kernels.compile import Kernel, kernel, unpack
from cpu_kernels.expert_lists import COUNT_BYTES, experts_before, gather
from cpu_kernels.finish import finish
from cpu_kernels.panel_product import by_width, fine_products, panel_product, scattered_product
from cpu_kernels.rows import activate
from cpu_kernels.simd import add, f32_at, i32_at, i64_at, load_f32, mul, set_f32, set_i32, set_i64, store_f32, zeros
from cpu_kernels.tiles import Layout
from cpu_kernels.unpacked import group_bytes, unpack_listed, unpack_tile

CHUNK = 8
"""Panels of one piece of work: as many as stay in the second-level cache while an expert's tiles pass."""
WIDTHS = vector_widths()
WIDEST = WIDTHS[0]


def up_scratch(layout: Layout, inputs: int) -> int:
    """Bytes that each thread needs for `experts_up`: sums of a panel, an unpacked tile, and panels."""
    return 2 * 64 * WIDEST + inputs // 32 * group_bytes(layout) + CHUNK * int(panel_bytes(inputs, WIDEST))


def down_scratch(layout: Layout, expert: int, tokens: int, each: int) -> int:
    """Bytes that each thread needs for `experts_down`, for each tile: sums of all tokens, and an expert's weights."""
    return each * (2 * 64 * (tokens + 1) + expert // 32 * group_bytes(layout))


@numba.njit(error_model="numpy")
def _width(tokens):
    """Of the panel for some tokens."""
    best = WIDEST
    for width in WIDTHS:
        if width >= tokens:
            best = width
    return best


@numba.njit(error_model="numpy")
def _chunk(piece, chunks, lists, each):
    """The list that a piece of work is about, and the first and last of its tokens."""
    at = lists + piece // chunks * each
    first = piece % chunks * CHUNK * WIDEST
    return at, first, min(i64_at(at), first + CHUNK * WIDEST)


@functools.cache
def experts_up(layout: Layout, gated: bool) -> Kernel:
    """Kernel: activations of each expert's tokens. A piece of work is an expert and some panels of its tokens.

    Args:
        layout: of the weights' tiles.

    Its arguments: out and its stride, lists, bytes of a list, its room, pieces of an expert, weight, bytes of a tile,
    groups of an expert, codes of single tokens, bytes between them, number of tokens, inputs, biases in the order of
    the weights' rows (0 for none), which activation, scratch memory and bytes of it for each thread.
    """
    unpack_row, fine_product, collect = unpack_tile(layout), fine_products(layout), gather()
    product = by_width({width: panel_product(layout, width) for width in WIDTHS}, f"experts up {layout.label}")
    tiles, unpacked_bytes = 4 if gated else 2, group_bytes(layout)

    @numba.njit(error_model="numpy")
    def finish_panel(sums, count, out, stride, tokens, slots, expert_bytes, bias, is_up, kind):
        for t in range(count):
            y = add(load_f32(sums + 64 * t), load_f32(sums + 64 * (WIDEST + t)))
            if bias != 0:
                y = add(y, load_f32(bias))
            place = out + i32_at(tokens + 4 * t) * stride + i32_at(slots + 4 * t) * expert_bytes
            store_f32(place, mul(load_f32(place), y) if is_up else activate(y, kind))

    @kernel(f"experts up {'gated' if gated else 'plain'} {layout.label}")
    def experts_up(arguments, tile, thread):
        (out, stride, lists, list_each, space, chunks, weight, tile_bytes, groups, rows, row_bytes, n_tokens, inputs,
         biases, kind, scratch, each) = unpack(arguments, "iiiiiiiiiiiiiiiii")  # fmt: skip
        at, first, end = _chunk(tile, chunks, lists, list_each)
        tokens, sums, size = at + COUNT_BYTES, scratch + thread * each, panel_bytes(inputs, WIDEST)
        slots, unpacked = tokens + 4 * space, sums + 128 * WIDEST
        panels = unpacked + inputs // 32 * unpacked_bytes
        for i in range(first, end, WIDEST):
            count, panel = min(WIDEST, end - i), panels + (i - first) // WIDEST * size
            collect(_width(count), panel, rows, row_bytes, tokens + 4 * i, count, n_tokens, inputs)
        begin = tile // chunks * groups * tiles
        for row in range(begin, begin + groups * tiles if first < end else begin):
            unpack_row(unpacked, weight + row * tile_bytes, inputs // 32)
            target = out + ((row - begin) // tiles * 2 + row % 2) * 64
            bias = biases + row * 64 if biases != 0 else 0
            for i in range(first, end, WIDEST):
                count, panel = min(WIDEST, end - i), panels + (i - first) // WIDEST * size
                width = _width(count)
                product(width, sums, unpacked, panel, inputs, weight + (row + 1) * tile_bytes)
                for t in range(width):
                    store_f32(sums + 64 * (WIDEST + t), zeros())
                fine_product(sums + 64 * WIDEST, unpacked, panel + fine_at(inputs, width))
                is_up = gated and row % 4 >= 2
                finish_panel(
                    sums, count, target, stride, tokens + 4 * i, slots + 4 * i, groups * 128, bias, is_up, kind
                )

    return experts_up


@kernel("experts' norms")
def experts_norms(arguments, tile, thread):
    """Root mean square of token `tile`'s activations.

    Its arguments: out, activations and their stride, masks and bytes between them, experts, groups of an expert.
    """
    out, h, stride, masks, mask_stride, experts, groups = unpack(arguments, "iiiiiii")
    n = experts_before(masks + tile * mask_stride, experts) * groups * 32
    set_f32(out + 4 * tile, root_mean_square(h + tile * stride, n))


@kernel("experts' codes")
def experts_codes(arguments, tile, thread):
    """Codes of the activations of an expert's tokens, some panels of them.

    Its arguments: panels, panels of an expert, activations and their stride, their tokens' root mean squares, lists,
    bytes of a list, its room, pieces of an expert, groups of an expert, tiles of one piece of `experts_down`.
    """
    panels, most, h, stride, norms, lists, each, space, chunks, groups, together = unpack(arguments, "iiiiiiiiiii")
    at, begin, end = _chunk(tile, chunks, lists, each)
    n, expert = 32 * groups, tile // chunks
    for i in range(begin, end, WIDEST):
        tokens, count = at + COUNT_BYTES + 4 * i, min(WIDEST, end - i)
        width, panel = _width(count), panels + (expert * most + i // WIDEST) * panel_bytes(n, WIDEST)
        first = panel + fine_at(n, width)
        fine = first + 64
        for group in range(groups):
            for t in range(count):
                token, slot = i32_at(tokens + 4 * t), i32_at(tokens + 4 * (space + t))
                x = h + token * stride + (slot * groups + group) * 128
                before = fine
                fine = quantize_group(x, f32_at(norms + 4 * token), panel, n, width, t, group, fine)
                # Fine groups add to sums of all tokens, not of a panel's.
                set_i32(before + 4, token * together)
        set_i64(first, (fine - first) // 64 - 1)
        for t in range(count, width):
            clear_token(panel, n, width, t)


@functools.cache
def experts_down(layout: Layout) -> Kernel:
    """Kernel: out = the sum of each token's experts (+ bias) (+ residual). A piece of work is some tiles of outputs.

    A panel is read once for all of them.

    Args:
        layout: of the weights' tiles.

    Its arguments: out and its stride, weight, bytes of a tile, number of tiles, tiles of one piece of work, panels,
    panels of an expert, lists, bytes of a list, experts, groups of an expert, all groups [int32], number of tokens,
    bias, residual (0 for none) and its stride, scratch memory and bytes of it for each thread.
    """
    unpack_groups, fine_product = unpack_listed(layout), fine_products(layout)
    band, next_tile, unpacked_bytes = layout.band, layout.group_bytes, group_bytes(layout)
    product = by_width({width: scattered_product(layout, width) for width in WIDTHS}, f"experts down {layout.label}")

    @kernel(f"experts down {layout.label}")
    def experts_down(arguments, tile, thread):
        (out, stride, weight, tile_bytes, n_tiles, each, panels, most, lists, list_each, experts, groups, every,
         n_tokens, bias, residual, residual_stride, scratch, scratch_each) = unpack(
            arguments, "iiiiiiiiiiiiiiiiiii"
        )  # fmt: skip
        begin, end = tile * each, min(tile * each + each, n_tiles)
        sums, n, stride_of_sums = scratch + thread * scratch_each, groups * 32, each * 64
        fine_sums = sums + stride_of_sums * (n_tokens + 1)
        unpacked, size = fine_sums + stride_of_sums * (n_tokens + 1), panel_bytes(n, WIDEST)
        for place in range(sums, unpacked, 64):
            store_f32(place, zeros())
        for expert in range(experts):
            tokens, count = lists + expert * list_each + COUNT_BYTES, i64_at(lists + expert * list_each)
            for row in range(begin, end if count > 0 else begin):
                first = weight + row // band * band * tile_bytes + row % band * next_tile
                unpack_groups(
                    unpacked + (row - begin) * groups * unpacked_bytes, first, every + 4 * expert * groups, groups
                )
            for i in range(0, count, WIDEST):
                width, panel = _width(count - i), panels + (expert * most + i // WIDEST) * size
                for r in range(end - begin):
                    weights = unpacked + r * groups * unpacked_bytes
                    product(width, sums + 64 * r, stride_of_sums, tokens + 4 * i, weights, panel, n)
                    fine_product(fine_sums + 64 * r, weights, panel + fine_at(n, width))
        for t in range(n_tokens):
            for row in range(begin, end):
                at = t * stride_of_sums + (row - begin) * 64
                y = add(load_f32(sums + at), load_f32(fine_sums + at))
                r = residual + t * residual_stride + row * 64 if residual != 0 else 0
                finish(y, out + t * stride + row * 64, bias + row * 64 if bias != 0 else 0, r)

    return experts_down
