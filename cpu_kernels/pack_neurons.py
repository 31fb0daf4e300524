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


@numba.njit(error_model="numpy")
def _write_codes(out, row, groups, part, parts, bits):
    """A row's codes into its neuron."""
    whole = groups // 16 * 16
    rest, count = groups - whole, (groups - whole) * parts
    for group in range(whole):
        start = part * whole + group // 16 * 16
        _write_group(out + start * 4 * bits, row, group, group % 16, 16, bits)
    first, m = 0, 16
    while first < count:
        while m > count + count % 2 - first:
            m //= 2
        here = out + (parts * whole + first) * 4 * bits
        if first + m > count:
            _clear(here, m * 4 * bits)
        for place in range(max(first, part * rest), min(first + m, part * rest + rest)):
            _write_group(here, row, whole + place - part * rest, place - first, m, bits)
        first += m


@numba.njit(error_model="numpy")
def _write_numbers(out, source, groups, part, parts, each, size):
    """Scales or biases, each of `each` groups of 32, into a neuron."""
    whole = groups // 16 * 16
    rest = groups - whole
    _copy(out + part * whole // each * size, source, whole // each * size)
    _copy(out + (parts * whole + part * rest) // each * size, source + whole // each * size, rest // each * size)
    if parts * groups % 2:
        _clear(out + groups * size, size)


@kernel("pack neuron rows")
def pack_neuron_rows(arguments, neuron, thread):
    """Codes, scales and, if there are any, biases of one row of a neuron."""
    (out, neuron_bytes, scales_at, biases_at, part, parts, packed, scales, biases, inputs, bits, group_size,
     size) = unpack(arguments, "iiiiiiiiiiiii")  # fmt: skip
    out += neuron * neuron_bytes
    groups, each, source = inputs // 32, group_size // 32, neuron * (inputs // group_size) * size
    _write_codes(out, packed + neuron * inputs * bits // 8, groups, part, parts, bits)
    _write_numbers(out + scales_at, scales + source, groups, part, parts, each, size)
    if biases != 0:
        _write_numbers(out + biases_at, biases + source, groups, part, parts, each, size)


@kernel("pack neuron floats")
def pack_neuron_floats(arguments, neuron, thread):
    """One row of a neuron, zeros up to a whole vector."""
    out, neuron_bytes, weight, inputs, size = unpack(arguments, "iiiii")
    out += neuron * neuron_bytes
    _copy(out, weight + neuron * inputs * size, inputs * size)
    _clear(out + inputs * size, -inputs % 16 * size)
