"""The vocabulary head by a sketch: cheap scores of all words, and exact logits of those that can still matter.

A score is off by a random amount whose deviation is known for each word and token. So a token's largest scores show
where to look first: the k-th largest exact logit found there is a border that the k-th largest of all cannot be below.
Words whose scores, with some deviations added, reach the border get exact logits too, whole tiles of 16 at once.
"""

from __future__ import annotations

import functools
import math

import numba
import numpy as np

from cpu_kernels.atomics import atomic_add
from cpu_kernels.compile import Kernel, kernel, unpack
from cpu_kernels.finish import finish
from cpu_kernels.float_linear import float_product
from cpu_kernels.gemv import row_tile
from cpu_kernels.masks import bits_above, lanes_at, lowest_bit, words
from cpu_kernels.simd import (
    add,
    f32_at,
    fma,
    i64_at,
    largest,
    load_f16,
    load_f32,
    set_f32,
    splat_f32,
    store_f32,
    total,
    zeros,
)
from cpu_kernels.tiles import Layout
from cpu_kernels.top_k import top_k

F32 = np.float32
NOTHING = F32(-np.inf)


def border_scratch(tiles: int, top: int) -> int:
    """Memory that each thread needs to find a border among so many tiles."""
    return 8 * (-(-tiles // 64) + top) + 64 * top


@kernel("sketch peaks")
def peaks(arguments, tile, thread):
    """Adds what all scores of a token have in common, and notes the largest of each 16. A tile: a piece of a token."""
    scores, stride, common, common_stride, out, out_stride, n_words, n_tiles, each, pieces = unpack(
        arguments, "iiiiiiiiii"
    )
    token, piece = tile // pieces, tile % pieces
    row, shift = scores + token * stride, splat_f32(f32_at(common + token * common_stride))
    for t in range(piece * each, min(piece * each + each, n_tiles)):
        v = add(load_f32(row + 64 * t), shift)
        store_f32(row + 64 * t, v)
        # What fills up the last tile is no word.
        v = lanes_at(row + 64 * t, n_words - 16 * t, NOTHING)
        set_f32(out + token * out_stride + 4 * t, largest(v))


@functools.cache
def _exact_tile(layout: Layout | None, kind: str):
    """Function: 16 logits, to the bit those of the whole product. x: a panel of width 1, or a row for float weights."""
    if layout is None:
        float_tile = float_product(1, kind)

        @numba.njit(error_model="numpy")
        def exact(out, weight, x, inputs, bias):
            float_tile(out, weight, x, 0, inputs)
            finish(load_f32(out), out, bias, 0)

        return exact
    product = row_tile(layout)

    @numba.njit(error_model="numpy")
    def exact(out, weight, x, inputs, bias):
        finish(product(weight, x, inputs), out, bias, 0)

    return exact


def _label(layout: Layout | None, kind: str) -> str:
    return kind if layout is None else layout.label


@functools.cache
def border(layout: Layout | None, kind: str) -> Kernel:
    """Kernel: each token's k-th largest exact logit among the tiles with the k largest peaks. A tile is a token.

    Args:
        layout, kind: of the head's tiles, as in their format.

    Its arguments: where borders go, peaks and bytes between the tokens', words, tiles, k; quantiles of the k largest of
    the tiles and of 16 k; weights, bytes of a tile, x and bytes between the tokens', inputs, bias (0 for none); scratch
    memory and bytes of it for each thread.
    """
    exact = _exact_tile(layout, kind)

    @kernel(f"sketch border {_label(layout, kind)}")
    def border(arguments, tile, thread):
        (out, tops, tops_stride, n_words, n_tiles, k, among_tiles, among_words, weight, tile_bytes, x, x_stride, inputs,
         bias, scratch, scratch_each) = unpack(arguments, "iiiiiiffiiiiiiii")  # fmt: skip
        logits = scratch + thread * scratch_each
        mask = logits + 64 * k
        top_k(mask, tops + tile * tops_stride, n_tiles, k, among_tiles)
        found = logits
        for w in range(words(n_tiles)):
            left = i64_at(mask + 8 * w)
            while left != 0:
                t = 64 * w + lowest_bit(left)
                exact(found, weight + t * tile_bytes, x + tile * x_stride, inputs, bias + 64 * t if bias != 0 else 0)
                store_f32(found, lanes_at(found, n_words - 16 * t, NOTHING))
                found += 64
                left &= left - 1
        top_k(mask, logits, 16 * k, k, among_words)
        lowest = F32(np.inf)
        for w in range(words(16 * k)):
            left = i64_at(mask + 8 * w)
            while left != 0:
                lowest = min(lowest, f32_at(logits + 4 * (64 * w + lowest_bit(left))))
                left &= left - 1
        set_f32(out + 4 * tile, lowest)

    return border


@numba.njit(error_model="numpy")
def _root_mean_square(x, n):
    squares = zeros()
    for i in range(0, n, 16):
        v = load_f32(x + 4 * i)
        squares = fma(v, v, squares)
    return math.sqrt(total(squares) / F32(n))


@functools.cache
def settle(layout: Layout | None, kind: str) -> Kernel:
    """Kernel: exact logits for the tiles of words whose scores may be off by enough to reach the token's border.

    Args:
        layout, kind: of the head's tiles, as in their format.

    A tile is a piece of a token. Its arguments: scores and bytes between the tokens'; deviations of the words' errors
    (float16) for a sketched input of size 1, how many of them count; sketched inputs, bytes between them and their
    number (of values, a multiple of 16); borders; counters of steps, words and tokens; tiles, tiles of a piece,
    pieces; weights, bytes of a tile, x and bytes between the tokens', inputs, bias (0 for none).
    """
    exact = _exact_tile(layout, kind)

    @kernel(f"sketch settle {_label(layout, kind)}")
    def settle(arguments, tile, thread):
        (scores, stride, errors, count, sketched, sketched_stride, n, borders, counters, n_tiles, each, pieces, weight,
         tile_bytes, x, x_stride, inputs, bias) = unpack(arguments, "iiifiiiiiiiiiiiiii")  # fmt: skip
        token, piece = tile // pieces, tile % pieces
        row, mine = scores + token * stride, x + token * x_stride
        reach = splat_f32(F32(count) * F32(_root_mean_square(sketched + token * sketched_stride, n)))
        limit = splat_f32(f32_at(borders + 4 * token))
        done = 0
        for t in range(piece * each, min(piece * each + each, n_tiles)):
            best = fma(load_f16(errors + 32 * t), reach, load_f32(row + 64 * t))
            if bits_above(best, limit, 1) != 0:
                exact(row + 64 * t, weight + t * tile_bytes, mine, inputs, bias + 64 * t if bias != 0 else 0)
                done += 1
        if done > 0:
            atomic_add(counters + 8, 16 * done)
        if piece == 0:
            atomic_add(counters + 16, 1)
        if tile == 0:
            atomic_add(counters, 1)

    return settle
