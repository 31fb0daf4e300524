"""Weights from their canonical form into the layout of `input_layout.py`. Tile = group of inputs."""

from __future__ import annotations

import numba

from cpu_kernels.compile import kernel, unpack
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
def _byte_of(i, wide):
    """Which byte of a segment holds its output i, for one half of the bits."""
    return i // 4 % 4 * 16 + i // 16 * 4 + i % 4 if wide else i


@numba.njit(error_model="numpy")
def _segment(at, packed, row_bytes, rows, first, size, wide, source_bits, bits, lift, column):
    """Codes of one input, `column`, for outputs first..first+size-1, each lifted by so much."""
    half = size // 2 if bits == 4 else size
    for i in range(half):
        value = 0
        if first + i < rows:
            value = _code(packed + (first + i) * row_bytes, source_bits, column) + lift
        if bits == 4 and first + half + i < rows:
            value |= (_code(packed + (first + half + i) * row_bytes, source_bits, column) + lift) << 4
        set_u8(at + _byte_of(i, wide), value)


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
    wide_size, narrow_size = (128, 32) if bits == 4 else (64, 16)
    for i in range(group_size):
        column = tile * group_size + i
        for s in range(wide):
            there = at + rows_at + (i * wide + s) * 64
            _segment(there, packed, row_bytes, rows, s * wide_size, wide_size, True, source_bits, bits, lift, column)
        for s in range(narrow):
            there, first = at + narrow_rows + (i * narrow + s) * 16, wide * wide_size + s * narrow_size
            _segment(there, packed, row_bytes, rows, first, narrow_size, False, source_bits, bits, lift, column)


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
