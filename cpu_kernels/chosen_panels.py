"""Many tokens' activations of chosen neurons, as codes in panels or as floats, side by side without the others.

A table's entry has room for 32 neurons: those that are chosen, in order, then zeros. The table has what any token
needs; a neuron that a token does not need is a zero too.
"""

from __future__ import annotations

import numba
from llvmlite import ir

from cpu_kernels import simd
from cpu_kernels.codes import panel_bytes, quantize_rows
from cpu_kernels.compile import kernel, unpack
from cpu_kernels.rows import activate
from cpu_kernels.simd import I32, A, F, add, f32_at, i32_at, load_f32, mul, op, set_f32, splat, store_f32, zeros
from cpu_kernels.table import count_of, entry_count, group_of, neurons_of

GATED, PLAIN, VALUED, TAKEN = range(4)
"""act(gate) * up; act(up); value * act(up); the value itself."""


@op(F(F, A, A, A))
def _kept(b, v, neurons, count, bits):
    """Lanes of v below `count` whose neuron [int32] has its bit in its group's 32, the others 0, whatever they were."""
    lanes = ir.Constant(simd.I.llvm, list(range(16)))
    listed = b.load(simd.pointer(b, neurons, simd.I.llvm), align=4)
    bit = b.lshr(splat(b, b.trunc(bits, I32)), b.and_(listed, simd.ints(31)))
    own = b.icmp_signed("!=", b.and_(bit, simd.ints(1)), simd.ints(0))
    return b.select(b.and_(own, b.icmp_signed("<", lanes, splat(b, b.trunc(count, I32)))), v, simd.floats(0))


@numba.njit(error_model="numpy")
def _collected(out, row, neurons, count):
    """An entry's numbers of a row that has one for each neuron, 32 floats; what is behind the last may be anything."""
    if count == 32:
        first = row + 4 * i32_at(neurons)
        store_f32(out, load_f32(first))
        store_f32(out + 64, load_f32(first + 64))
        return
    for i in range(count):
        set_f32(out + 4 * i, f32_at(row + 4 * i32_at(neurons + 4 * i)))


@numba.njit(error_model="numpy")
def _activated(source, mode, kind, i, gate_bias, up_bias, value):
    """16 activations from number i on of an entry. source: what `gemm_up` gave."""
    if mode == TAKEN:
        return load_f32(value + 4 * i)
    y = add(load_f32(source + (128 if mode == GATED else 0) + 4 * i), load_f32(up_bias + 4 * i))
    if mode == PLAIN:
        return activate(y, kind)
    if mode == GATED:
        return mul(activate(add(load_f32(source + 4 * i), load_f32(gate_bias + 4 * i)), kind), y)
    return mul(load_f32(value + 4 * i), activate(y, kind))


@kernel("activate chosen")
def activate_chosen(arguments, tile, thread):
    """A panel of tokens: their activations, then their codes.

    Its arguments: what `gemm_up` gave and its stride, table, its groups, mode, which
    activation, biases of gate and of up by neuron (0 for none), values by neuron and their stride, masks (0 for none)
    and their stride, panels (0 for floats), tokens of a panel, width of the last, number of tokens, where activations
    go (memory for a panel's for each thread; without panels, for all tokens), bytes between the memory of threads, and
    96 floats for each thread.
    """
    (x, stride, table, groups, mode, kind, gate_bias, up_bias, values, values_stride, masks, mask_stride,
     panels, width, last_width, n_tokens, out, each, spare) = unpack(arguments, "iiiiiiiiiiiiiiiiiii")  # fmt: skip
    n, parts, row_bytes = 32 * entry_count(table), 2 if mode == GATED else 1, 128 * groups
    first, end = tile * width, min(tile * width + width, n_tokens)
    h = out + thread * each if panels != 0 else out + first * row_bytes
    gates, ups, value = spare + 384 * thread, spare + 384 * thread + 128, spare + 384 * thread + 256
    for i in range(0, 384, 64):
        store_f32(gates + i, zeros())
    for entry in range(entry_count(table)):
        chosen, count = neurons_of(table, groups, entry), count_of(table, groups, entry)
        if gate_bias != 0:
            _collected(gates, gate_bias, chosen, count)
        if up_bias != 0:
            _collected(ups, up_bias, chosen, count)
        for token in range(first, end):
            bits = i32_at(masks + token * mask_stride + 4 * group_of(table, entry)) if masks != 0 else -1
            if values != 0:
                _collected(value, values + token * values_stride, chosen, count)
            source, target = x + token * stride + entry * 128 * parts, h + (token - first) * row_bytes + entry * 128
            for i in range(0, 32, 16):
                y = _activated(source, mode, kind, i, gates, ups, value)
                store_f32(target + 4 * i, _kept(y, chosen + 4 * i, count - i, bits))
    if panels != 0:
        panel = panels + tile * panel_bytes(n, width)
        quantize_rows(h, row_bytes, end - first, panel, n, last_width if end == n_tokens else width)
