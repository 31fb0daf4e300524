"""Gate and up of the neurons in a table, for one token and weights by neuron (`row_layout`, `float_rows`).

A table lists neurons by groups of 32 that have any ("entries"), all int32:

    the number of entries and that of neurons, in 64 bytes
    [G] group of each entry
    [G] neurons of each entry, 1 to 32
    [G][32] those neurons, ascending

Results are [entry][32] activations in the table's order, zeros behind an entry's last.
"""

from __future__ import annotations

import functools

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.compile import Kernel, kernel, unpack
from cpu_kernels.float_rows import FloatRows, float_products
from cpu_kernels.row_layout import RowLayout
from cpu_kernels.row_products import quantized_products
from cpu_kernels.rows import activate
from cpu_kernels.simd import (
    I32,
    I64,
    A,
    F,
    add,
    f32_at,
    i32_at,
    load_f32,
    mul,
    offset,
    op,
    prefetch_l2,
    set_f32,
    set_i32,
    store_f32,
)
from cpu_kernels.sum_lanes import sums_of_each
from cpu_kernels.table import count_of, first_entry, neurons_of
from cpu_kernels.threads import first_tile

PACK = 4
"""Neurons whose lanes are summed together."""
AHEAD = 9216
"""Bytes of weights ahead of their use at which those of neurons that do not follow each other are asked for."""


def packs_ahead(layout: RowLayout | FloatRows) -> int:
    """AHEAD in packs."""
    return -(-AHEAD // (PACK * layout.neuron_bytes))


def most_neurons(layout: RowLayout | FloatRows, entries: int) -> int:
    """Neurons that a thread's scratch memory must have room for, with pieces of so many entries."""
    return 32 * entries + PACK * packs_ahead(layout) + 64


def scratch_bytes(layout: RowLayout | FloatRows, entries: int) -> int:
    """Memory that each thread needs: the list, and the sums of both rows, and what is added or multiplied."""
    return 4 * 4 * most_neurons(layout, entries)


@functools.cache
def _pack_sums(layout: RowLayout | FloatRows):
    """Intrinsic: the rows of the 4 neurons named at an address times a token -> their sums at `out`.

    Those of second rows go `second` bytes further. Weights of neurons named further on are asked for.
    """
    products = quantized_products if isinstance(layout, RowLayout) else float_products
    ahead = PACK * packs_ahead(layout)

    @intrinsic
    def pack_sums(context, out, second, weights, neurons, token):
        def codegen(ctx, b, signature, args):
            out, second, weights, neurons, token = args
            lanes = cgutils.alloca_once(b, simd.F.llvm, PACK * layout.parts)
            # What follows in memory comes without being asked for, and faster.
            far = b.sub(simd.i32_at.build(b, offset(b, neurons, 4 * (ahead + PACK - 1))), simd.i32_at.build(b, neurons))
            distance = b.select(b.icmp_signed("==", far, I64(ahead + PACK - 1)), I64(0), I64(4 * ahead))
            with cgutils.for_range(b, I64(PACK)) as loop:
                named = b.add(neurons, b.shl(loop.index, I64(2)))
                number, later = (simd.i32_at.build(b, at) for at in (named, b.add(named, distance)))
                at = b.add(weights, b.mul(number, I64(layout.neuron_bytes)))
                fetched = b.mul(b.sub(later, number), I64(layout.neuron_bytes))
                for part, total in enumerate(products(b, layout, at, fetched, token)):
                    b.store(total, b.gep(lanes, [b.add(loop.index, I64(part * PACK))]))
            sums = sums_of_each(b, [b.load(b.gep(lanes, [I64(i)])) for i in range(PACK * layout.parts)])
            for part in range(layout.parts):
                order = ir.Constant(ir.VectorType(I32, PACK), list(range(part * PACK, (part + 1) * PACK)))
                mine = b.shuffle_vector(sums, sums, order)
                here = b.add(out, b.mul(second, I64(part)))
                b.store(mine, simd.pointer(b, here, mine.type), align=4)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return pack_sums


@op(F(F, A))
def first_lanes(b, v, n):
    """The first n lanes of v, zeros in the others."""
    lane = ir.Constant(simd.I.llvm, list(range(simd.LANES)))
    return b.select(b.icmp_signed("<", lane, simd.splat(b, b.trunc(n, I32))), v, simd.floats(0))


@numba.njit(error_model="numpy")
def _list(table, groups, first, end, stop, more, out):
    """The neurons of some entries one after the other; then at least `more` of those up to `stop`, or the last again.

    Returns how many the entries have.
    """
    at, total = 0, 0
    for entry in range(first, stop):
        if entry == end:
            total = at
        if entry >= end and at >= total + more:
            return total
        row = neurons_of(table, groups, entry)
        for i in range(0, 128, 64):
            store_f32(out + 4 * at + i, load_f32(row + i))
        at += count_of(table, groups, entry)
    total = at if end == stop else total
    last = i32_at(out + 4 * at - 4)
    for i in range(at, total + more):
        set_i32(out + 4 * i, last)
    return total


@numba.njit(error_model="numpy")
def _gather(out, source, neurons, count):
    for i in range(count):
        set_f32(out + 4 * i, f32_at(source + 4 * i32_at(neurons + 4 * i)))


@numba.njit(error_model="numpy")
def _add_bias(sums, bias, neurons, count, spare):
    _gather(spare, bias, neurons, count)
    for i in range(0, 4 * count, 64):
        store_f32(sums + i, add(load_f32(sums + i), load_f32(spare + i)))


@numba.njit(error_model="numpy")
def _activate(sums, factors, count, kind):
    """Activation of sums, times factors; addresses, 0 for no factors."""
    for i in range(0, 4 * count, 64):
        y = activate(load_f32(sums + i), kind)
        if factors != 0:
            y = mul(y, load_f32(factors + i))
        store_f32(sums + i, y)


@numba.njit(error_model="numpy")
def _spread(out, table, groups, first, end, values):
    """Values of listed neurons to the places of their entries."""
    for entry in range(first, end):
        count = count_of(table, groups, entry)
        for i in range(0, 32, 16):
            store_f32(out + 128 * entry + 4 * i, first_lanes(load_f32(values + 4 * i), count - i))
        values += 4 * count


@functools.cache
def fetch_rows(layout: RowLayout) -> Kernel:
    """Kernel: asks for the neurons that a thread starts with, as many as are fetched ahead later.

    Its arguments: table, G, weights, pieces of work, and threads.
    """
    ahead, nbytes = PACK * packs_ahead(layout), layout.neuron_bytes

    @kernel(f"fetch rows {layout.label}")
    def fetch_rows(arguments, tile, thread):
        table, groups, weights, pieces, threads = unpack(arguments, "iiiii")
        first, left = first_entry(table, first_tile(pieces, thread, threads), pieces), ahead
        for entry in range(first, first_entry(table, first_tile(pieces, thread + 1, threads), pieces)):
            for i in range(min(count_of(table, groups, entry), left)):
                neuron = weights + i32_at(neurons_of(table, groups, entry) + 4 * i) * nbytes
                for line in range(neuron & -64, neuron + nbytes, 64):
                    prefetch_l2(line)
                left -= 1

    return fetch_rows


@functools.cache
def sparse_rows(layout: RowLayout | FloatRows) -> Kernel:
    """Kernel: act(gate x) * up x of the neurons in a table; with one row a neuron act(up x), or value * act(up x).

    Args:
        layout: of the weights.

    Its arguments: out, table, G, weights, the token (codes, or floats) and the bytes between those of threads, pieces
    of work, biases of gate and up and values, all by neuron (0 for none), kind of activation, scratch memory, bytes of
    it for each thread, neurons that it has room for, and threads.
    """
    pack_sums, gated, more = _pack_sums(layout), layout.parts == 2, PACK * (packs_ahead(layout) + 2)

    @kernel(f"sparse rows {layout.label}")
    def sparse_rows(arguments, piece, thread):
        (out, table, groups, weights, token, token_bytes, pieces, gate_bias, up_bias, values, kind, scratch,
         scratch_bytes, room, threads) = unpack(arguments, "iiiiiiiiiiiiiii")  # fmt: skip
        n = i32_at(table)
        first, end = piece * n // pieces, (piece + 1) * n // pieces
        if first < end:
            neurons = scratch + thread * scratch_bytes
            sums, others, spare = neurons + 4 * room, neurons + 8 * room, neurons + 12 * room
            # What another thread will start with is not fetched here.
            stop = end if piece + 1 == first_tile(pieces, thread + 1, threads) else n
            count = _list(table, groups, first, end, stop, more, neurons)
            for i in range(0, 4 * count, 4 * PACK):
                pack_sums(sums + i, 4 * room, weights, neurons + i, token + thread * token_bytes)
            if gate_bias != 0:
                _add_bias(sums, gate_bias, neurons, count, spare)
            if up_bias != 0:
                _add_bias(others if gated else sums, up_bias, neurons, count, spare)
            if values != 0:
                _gather(others, values, neurons, count)
            factors = others if gated or values != 0 else 0
            _activate(sums, factors, count, kind)
            _spread(out, table, groups, first, end, sums)

    return sparse_rows
