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
def _quad(row, quad, bits):
    """Four codes of a canonical row, a byte each."""
    if bits == 8:
        return i32_at(row + 4 * quad)
    x = u8_at(row + 2 * quad) | u8_at(row + 2 * quad + 1) << 8
    return x & 15 | (x & 0xF0) << 4 | (x & 0xF00) << 8 | (x & 0xF000) << 12


@numba.njit(error_model="numpy")
def _place(row, place, m, first, groups, bits):
    """The four codes at a place (vector times 16 + lane) of a segment of m groups, zeros beyond the row."""
    vector, lane = place // 16, place % 16
    group = first + lane % m
    return _quad(row, group * 8 + lane // m * (m // 2) + vector, bits) if group < groups else 0


@numba.njit(error_model="numpy")
def _write_segment(out, row, m, first, groups, bits):
    """Returns where the next segment goes."""
    words = m * bits
    for i in range(words):
        word = _place(row, i, m, first, groups, bits)
        if bits == 4:
            word |= _place(row, i + words, m, first, groups, bits) << 4
        set_i32(out + 4 * i, word)
    return out + 4 * words


@kernel("pack neuron rows")
def pack_neuron_rows(arguments, neuron, thread):
    """One row of a neuron: its codes, scales and, if there are any, biases, each to its place."""
    (codes_out, scales_out, biases_out, neuron_bytes, packed, scales, biases, inputs, bits, group_size,
     size) = unpack(arguments, "iiiiiiiiiii")  # fmt: skip
    groups, skip = inputs // 32, neuron * neuron_bytes
    row, out, first = packed + neuron * inputs * bits // 8, codes_out + skip, 0
    while first < groups:
        m = 16
        while first + m > groups + groups % 2:
            m //= 2
        out = _write_segment(out, row, m, first, groups, bits)
        first += m
    columns = inputs // group_size
    source = neuron * columns * size
    _write_numbers(scales_out + skip, scales + source, columns, size, group_size)
    if biases != 0:
        _write_numbers(biases_out + skip, biases + source, columns, size, group_size)


@numba.njit(error_model="numpy")
def _write_numbers(out, source, columns, size, group_size):
    _copy(out, source, columns * size)
    if group_size == 32 and columns % 2:
        for i in range(size):
            set_u8(out + columns * size + i, 0)


@kernel("pack neuron floats")
def pack_neuron_floats(arguments, neuron, thread):
    """One row of a neuron, zeros up to a whole vector."""
    out, neuron_bytes, weight, inputs, size = unpack(arguments, "iiiii")
    out += neuron * neuron_bytes
    _copy(out, weight + neuron * inputs * size, inputs * size)
    for i in range(inputs * size, -(-inputs // 16) * 16 * size):
        set_u8(out + i, 0)
