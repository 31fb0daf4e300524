"""Rows from their canonical form into pieces by neuron: quantized as `row_layout` says, floats as they are."""

from __future__ import annotations

import numba

from cpu_kernels.compile import kernel, unpack
from cpu_kernels.simd import i32_at, set_i32, set_u8, u8_at


@numba.njit(error_model="numpy")
def _copy(out, source, nbytes):
    for i in range(nbytes):
        set_u8(out + i, u8_at(source + i))


@numba.njit(error_model="numpy")
def _clear(out, nbytes):
    for i in range(nbytes):
        set_u8(out + i, 0)


@numba.njit(error_model="numpy")
def _quad(row, quad, bits):
    """Four codes of a canonical row, a byte each."""
    if bits == 8:
        return i32_at(row + 4 * quad)
    x = u8_at(row + 2 * quad) | u8_at(row + 2 * quad + 1) << 8
    return x & 15 | (x & 0xF0) << 4 | (x & 0xF00) << 8 | (x & 0xF000) << 12


@numba.njit(error_model="numpy")
def _write_group(out, row, group, lane, m, bits):
    """The codes of a group into a segment of m groups, in which it is number `lane`."""
    words = m * bits
    for i in range(lane, words, m):
        word = 0
        for half in range(8 // bits):
            place = i + half * words
            quad = place % 16 // m * (m // 2) + place // 16
            word |= _quad(row, group * 8 + quad, bits) << 4 * half
        set_i32(out + 4 * i, word)


@kernel("pack neuron groups")
def pack_neuron_groups(arguments, neuron, thread):
    """A run of groups of a canonical row: codes into a segment, scales and, if there are any, biases."""
    (neuron_bytes, codes_out, scales_out, biases_out, m, lane, group, count, packed, scales, biases, inputs, bits,
     group_size, size) = unpack(arguments, "iiiiiiiiiiiiiii")  # fmt: skip
    skip, row, each = neuron * neuron_bytes, packed + neuron * inputs * bits // 8, group_size // 32
    for i in range(count):
        _write_group(codes_out + skip, row, group + i, lane + i, m, bits)
    source, target = (neuron * (inputs // group_size) + group // each) * size, skip + lane // each * size
    _copy(scales_out + target, scales + source, count // each * size)
    if biases != 0:
        _copy(biases_out + target, biases + source, count // each * size)


@kernel("pack neuron floats")
def pack_neuron_floats(arguments, neuron, thread):
    """One row of a neuron, zeros up to a whole vector."""
    out, neuron_bytes, weight, inputs, size = unpack(arguments, "iiiii")
    out += neuron * neuron_bytes
    _copy(out, weight + neuron * inputs * size, inputs * size)
    _clear(out + inputs * size, -inputs % 16 * size)
