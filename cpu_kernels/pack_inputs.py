"""Weights from their canonical form into the layout of `input_layout.py`. Tile = group of inputs."""

from __future__ import annotations

import numba

from cpu_kernels.compile import kernel, unpack
from cpu_kernels.input_layout import byte_of
from cpu_kernels.simd import i32_at, set_i32, set_u8, u8_at


@numba.njit(error_model="numpy")
def _code(row, bits, i):
    """Code of input i in a canonical row."""
    first = i * bits
    at, shift = row + (first >> 3), first & 7
    value = u8_at(at) >> shift
    if shift + bits > 8:
        value |= u8_at(at + 1) << (8 - shift)
    return value & ((1 << bits) - 1)


@numba.njit(error_model="numpy")
def _segment(at, packed, row_bytes, rows, first, vectors, wide, source_bits, bits, lift, column):
    """Codes of one input, `column`, for so many vectors of outputs, each lifted by so much."""
    half = vectors // 2 if bits == 4 else vectors
    for i in range(16 * vectors):
        vector, row = i // 16, first + i
        if row < rows:
            code = _code(packed + row * row_bytes, source_bits, column) + lift
            place = at + byte_of(vector % half, i % 16, wide)
            set_u8(place, u8_at(place) | code << (4 if vector >= half else 0))


@numba.njit(error_model="numpy")
def _numbers(at, source, rows, columns, column, size):
    """A column of scales or biases."""
    for row in range(rows):
        here = source + (row * columns + column) * size
        if size == 4:
            set_i32(at + 4 * row, i32_at(here))
        else:
            set_u8(at + 2 * row, u8_at(here))
            set_u8(at + 2 * row + 1, u8_at(here + 1))


@kernel("pack quantized by inputs")
def pack_quantized(arguments, tile, thread):
    """One group of integers; memory is zeros before."""
    (out, wide, narrow, biases_at, rows_at, narrow_rows, group_bytes, packed, scales, biases, rows, inputs, source_bits,
     bits, lift, group_size, size) = unpack(arguments, "iiiiiiiiiiiiiiiii")  # fmt: skip
    at, row_bytes, columns = out + tile * group_bytes, inputs * source_bits // 8, inputs // group_size
    _numbers(at, scales, rows, columns, tile, size)
    if biases != 0:
        _numbers(at + biases_at, biases, rows, columns, tile, size)
    wide_vectors, narrow_vectors = (8, 4) if bits == 4 else (4, 2)
    for i in range(group_size):
        column = tile * group_size + i
        for s in range(wide):
            there, first = at + rows_at + (i * wide + s) * 64, 16 * s * wide_vectors
            _segment(there, packed, row_bytes, rows, first, wide_vectors, True, source_bits, bits, lift, column)
        for s in range(narrow):
            there, first = at + narrow_rows + (i * narrow + s) * 32, 16 * (wide * wide_vectors + s * narrow_vectors)
            _segment(there, packed, row_bytes, rows, first, narrow_vectors, False, source_bits, bits, lift, column)


@kernel("pack floats by inputs")
def pack_floats(arguments, tile, thread):
    """32 inputs of 2- or 4-byte floats; memory is zeros before."""
    out, wide, narrow, rows_at, narrow_rows, group_bytes, weight, rows, inputs, size = unpack(arguments, "iiiiiiiiii")
    for i in range(min(32, inputs - tile * 32)):
        at = out + tile * group_bytes + rows_at + i * wide * 64 * size
        for row in range(rows):
            if row == 64 * wide:
                at = out + tile * group_bytes + narrow_rows + i * narrow * 16 * size - 64 * wide * size
            here, there = weight + (row * inputs + tile * 32 + i) * size, at + row * size
            if size == 4:
                set_i32(there, i32_at(here))
            else:
                set_u8(there, u8_at(here))
                set_u8(there + 1, u8_at(here + 1))
