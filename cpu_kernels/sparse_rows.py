"""Gate and up of the neurons in a table, for one token and weights by neuron (`row_layout`).

A table lists neurons by groups of 32 that have any ("entries"), all int32:

    the number of entries and that of neurons, in 64 bytes
    [G] group of each entry
    [G] neurons of each entry, 1 to 32
    [G][32] those neurons, ascending, the last repeated up to a multiple of 4

Results are [entry][32] activations in the table's order, zeros behind an entry's last.
"""

from __future__ import annotations

import functools

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_kernels import simd
from cpu_kernels.compile import Kernel, kernel, unpack
from cpu_kernels.float_rows import float_products
from cpu_kernels.row_layout import RowLayout
from cpu_kernels.row_products import quantized_products
from cpu_kernels.rows import activate
from cpu_kernels.simd import I64, f32_at, i32_at, load_f32, mul, offset, set_f32, store_f32
from cpu_kernels.sum_lanes import sums_of_each

PACK = 4
"""Neurons whose products are computed together."""
HEADER = 64
"""Bytes of a table before its groups."""


@functools.cache
def _pack_sums(layout: RowLayout, AT_ONCE: int = 2):
    """Intrinsic: the rows of 4 neurons times a token -> their sums at `out`, those of the second rows 128 bytes on.

    `neurons` and `ahead` are where the table names them and those to be fetched for what follows.
    """

    @intrinsic
    def pack_sums(context, out, weights, neurons, ahead, codes):
        multiply = quantized_products if isinstance(layout, RowLayout) else float_products

        def codegen(ctx, b, signature, args):
            out, weights, neurons, ahead, codes = args

            def neuron(at, i):
                number = simd.i32_at.build(b, offset(b, at, 4 * i))
                return b.add(weights, b.mul(number, I64(layout.neuron_bytes)))

            places = [neuron(neurons, i) for i in range(PACK)]
            places = [(place, b.sub(neuron(ahead, i), place)) for i, place in enumerate(places)]
            some = [multiply(b, layout, places[i : i + AT_ONCE], codes) for i in range(0, PACK, AT_ONCE)]
            sums = sums_of_each(b, [total for part in zip(*some) for totals in part for total in totals])
            for p in range(layout.parts):
                order = ir.Constant(ir.VectorType(simd.I32, PACK), list(range(p * PACK, p * PACK + PACK)))
                part = b.shuffle_vector(sums, sums, order)
                b.store(part, simd.pointer(b, offset(b, out, 128 * p), part.type), align=4)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return pack_sums


@numba.njit(error_model="numpy")
def finish_entry(out, sums, neurons, count, gate_bias, up_bias, values, kind, gated):
    """Activations of an entry from the sums of its rows: those of gate, then 128 bytes on those of up.

    Where there are values, by neuron, they stand for what the gate gives. Biases and values are addresses, 0 for none.
    """
    up = sums + 128 if gated else sums
    for i in range(count):
        neuron = 4 * i32_at(neurons + 4 * i)
        if gate_bias != 0:
            set_f32(sums + 4 * i, f32_at(sums + 4 * i) + f32_at(gate_bias + neuron))
        if up_bias != 0:
            set_f32(up + 4 * i, f32_at(up + 4 * i) + f32_at(up_bias + neuron))
        if values != 0:
            set_f32(out + 4 * i, f32_at(up + 4 * i) * f32_at(values + neuron))
    for i in range(0, 128 if values == 0 else 0, 64):
        y = activate(load_f32(sums + i), kind)
        store_f32(out + i, mul(y, load_f32(up + i)) if gated else y)
    for i in range(count, 32):
        set_f32(out + 4 * i, numba.float32(0))


@functools.cache
def sparse_rows(layout: RowLayout, AT_ONCE: int = 2) -> Kernel:
    """Kernel: act(gate x) * up x of the neurons in a table, act(up x), or value * up x.

    Args:
        layout: of the weights.

    Its arguments: out, table, G, weights, codes and the bytes between those of threads, pieces of work, biases of gate
    and up and values (0 for none), kind of activation, scratch memory and bytes of it for each thread.
    """
    pack_sums, gated = _pack_sums(layout, AT_ONCE), layout.parts == 2

    @kernel(f"sparse rows {layout.label} {AT_ONCE}")
    def sparse_rows(arguments, piece, thread):
        (out, table, groups, weights, codes, codes_bytes, pieces, gate_bias, up_bias, values, kind, scratch,
         scratch_bytes) = unpack(arguments, "iiiiiiiiiiiii")  # fmt: skip
        n, sums, own = i32_at(table), scratch + thread * scratch_bytes, codes + thread * codes_bytes
        counts, lists = table + HEADER + 4 * groups, table + HEADER + 8 * groups
        for entry in range(piece * n // pieces, (piece + 1) * n // pieces):
            count, neurons = i32_at(counts + 4 * entry), lists + 128 * entry
            for i in range(0, count, PACK):
                here = neurons + 4 * i
                ahead = here + 4 * PACK if i + PACK < count else neurons + 128 if entry + 1 < n else here
                pack_sums(sums + 4 * i, weights, here, ahead, own)
            finish_entry(out + 128 * entry, sums, neurons, count, gate_bias, up_bias, values, kind, gated)

    return sparse_rows
