"""Which tokens an expert has, and their int8 codes side by side.

A token's mask has a bit for each expert. The results of a token's experts lie side by side, in ascending order; where
one is among them is its *slot*. An expert's list is:

    count (64 bytes), then int32 [room] tokens, ascending, then int32 [room] their slots

What is left of the list's last panel is filled with the number of a token that there is none of.
"""

from __future__ import annotations

import functools

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.codes import FINE_GROUP, fine_at, vector_widths
from cpu_kernels.compile import kernel, unpack
from cpu_kernels.panel_product import by_width
from cpu_kernels.simd import (
    I32,
    I64,
    VOID,
    A,
    B,
    I,
    call,
    i32_at,
    i64_at,
    load_bytes,
    offset,
    op,
    pointer,
    set_i32,
    set_i64,
)

COUNT_BYTES = 64


def room(tokens: int) -> int:
    """Tokens that a list has room for."""
    return -(-tokens // 16) * 16 + 16


def list_bytes(tokens: int) -> int:
    """Bytes of an expert's list."""
    return COUNT_BYTES + 8 * room(tokens)


@op(A(A))
def bits_set(b, word):
    """How many bits of a word are set."""
    return call(b, "llvm.ctpop.i64", I64, [word])


@numba.njit(error_model="numpy")
def experts_before(mask, expert):
    """How many experts before one a token's mask has."""
    count = 0
    for word in range(expert // 64):
        count += bits_set(i64_at(mask + 8 * word))
    if expert % 64 > 0:
        count += bits_set(i64_at(mask + expert // 64 * 8) & ((1 << expert % 64) - 1))
    return count


@kernel("expert tokens")
def expert_tokens(arguments, tile, thread):
    """The list of expert `tile`.

    Its arguments: lists, bytes of a list, its room, masks and bytes between them, number of tokens, widest panel.
    """
    lists, each, space, masks, stride, n_tokens, widest = unpack(arguments, "iiiiiii")
    tokens = lists + tile * each + COUNT_BYTES
    slots, count = tokens + 4 * space, 0
    for token in range(n_tokens):
        mask = masks + token * stride
        if i64_at(mask + tile // 64 * 8) >> tile % 64 & 1:
            set_i32(tokens + 4 * count, token)
            set_i32(slots + 4 * count, experts_before(mask, tile))
            count += 1
    for i in range(count, (count + widest - 1) // widest * widest):
        set_i32(tokens + 4 * i, n_tokens)
    set_i64(tokens - COUNT_BYTES, count)


@functools.cache
def _interleave(width: int):
    """Intrinsic: the 4-byte words of rows side by side, as panels have them, 16 words of 4 rows at once.

    Up to 15 words more are read and written, where rows and panels have their fine groups.
    """

    @intrinsic
    def interleave(context, panel, rows, row_bytes, tokens, last, words):
        def codegen(ctx, b, signature, args):
            panel, rows, row_bytes, tokens, last, words = args
            sources = []
            for t in range(width):
                token = simd.i32_at.build(b, offset(b, tokens, 4 * t))
                token = b.select(b.icmp_signed("<", token, last), token, last)
                sources.append(b.add(rows, b.mul(token, row_bytes)))
            with cgutils.for_range(b, b.lshr(b.add(words, I64(15)), I64(4))) as loop:
                at = b.mul(loop.index, I64(64))
                out = b.add(panel, b.mul(at, I64(width)))
                for first in range(0, width, 4):
                    four = [b.load(pointer(b, b.add(s, at), I.llvm), align=4) for s in sources[first : first + 4]]
                    for word, column in enumerate(_columns(b, four)):
                        place = offset(b, out, 4 * (width * word + first))
                        b.store(column, pointer(b, place, column.type), align=4)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return interleave


def _columns(b, rows):
    """The 16 columns of 4 rows of 16 words."""

    def shuffled(x, y, lanes):
        # Within each 16 bytes, which no CPU has to leave for it. Lanes from 4 on are y's.
        places = [4 * part + lane % 4 + lane // 4 * 16 for part in range(4) for lane in lanes]
        return b.shuffle_vector(x, y, ir.Constant(I.llvm, places))

    x, y, z, w = rows
    low = shuffled(x, y, [0, 4, 1, 5]), shuffled(z, w, [0, 4, 1, 5])
    high = shuffled(x, y, [2, 6, 3, 7]), shuffled(z, w, [2, 6, 3, 7])
    quarters = [shuffled(*pair, lanes) for pair in (low, high) for lanes in ([0, 1, 4, 5], [2, 3, 6, 7])]
    for part in range(4):
        index = ir.Constant(ir.VectorType(I32, 4), list(range(4 * part, 4 * part + 4)))
        yield from (b.shuffle_vector(quarter, quarter, index) for quarter in quarters)


@op(VOID(A, B))
def _store_bytes(b, a, v):
    b.store(v, pointer(b, a, B.llvm), align=4)


@functools.cache
def gather(widths: tuple[int, ...] = vector_widths()):
    """Numba function: codes of single tokens (panels of width 1) become a panel.

    Its arguments: width, panel, codes of single tokens, bytes between them, the tokens' numbers [int32] of which the
    panel has a whole width, how many of those there are, number of all tokens, inputs.
    """
    interleave = by_width({width: _interleave(width) for width in widths}, "gather")

    @numba.njit(error_model="numpy")
    def gather(width, panel, rows, row_bytes, tokens, count, n_tokens, n):
        interleave(width, panel, rows, row_bytes, tokens, n_tokens - 1, n // 8 * 3)
        first = panel + fine_at(n, width)
        fine = first + 64
        for t in range(count):
            source = rows + i32_at(tokens + 4 * t) * row_bytes + fine_at(n, 1)
            for entry in range(source + 64, source + 64 + i64_at(source) * FINE_GROUP, FINE_GROUP):
                _store_bytes(fine, load_bytes(entry))
                set_i32(fine + 4, t)
                fine += FINE_GROUP
        set_i64(first, (fine - first) // FINE_GROUP - 1)

    return gather
