"""Weights from their canonical form into the tiles of `linear.py`, and single rows back out of them."""

from __future__ import annotations

import numba

from cpu_kernels.compile import kernel, unpack
from cpu_kernels.simd import (
    bf16_at,
    f16_at,
    f32_at,
    i8_at,
    i32_at,
    set_f32,
    set_i32,
    set_u8,
    store_folded_nibbles,
    u8_at,
)


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
def _write_codes(at, source, row_bytes, valid, bits, start):
    """Codes of 32 inputs of 16 rows, as `linear` describes them."""
    if bits in (4, 8):
        for lane in range(16):
            here = source + lane * row_bytes + start * bits // 8
            for quad in range(bits):
                if lane >= valid:
                    set_i32(at + quad * 64 + lane * 4, 0)
                elif bits == 8:
                    set_i32(at + quad * 64 + lane * 4, i32_at(here + 4 * quad))
            if bits == 4 and lane < valid:
                store_folded_nibbles(at + lane * 4, 64, here)
        return
    for lane in range(16):
        row = source + lane * row_bytes
        for quad in range(bits):
            set_i32(at + quad * 64 + lane * 4, 0)
        for k in range(32 if lane < valid else 0):
            code = _code(row, bits, start + k)
            quad, byte = k // 4, lane * 4 + k % 4
            if bits == 2:
                _or_u8(at + quad // 4 * 64 + byte, code << quad % 4 * 2)
                continue
            _or_u8(at + quad % 4 * 64 + byte, (code & 15) << (quad // 4 * 4))
            if bits == 5:
                _or_u8(at + 256 + byte, code >> 4 << quad)
            else:
                _or_u8(at + 256 + quad // 4 * 64 + byte, code >> 4 << quad % 4 * 2)


@numba.njit(error_model="numpy")
def _or_u8(at, value):
    set_u8(at, u8_at(at) | value)


@numba.njit(error_model="numpy")
def _read_code(at, lane, bits, k):
    """Code of input k of 32 in one row of a tile."""
    quad, byte = k // 4, lane * 4 + k % 4
    if bits == 8:
        return u8_at(at + quad * 64 + byte)
    if bits == 2:
        return u8_at(at + quad // 4 * 64 + byte) >> quad % 4 * 2 & 3
    code = u8_at(at + quad % 4 * 64 + byte) >> (quad // 4 * 4) & 15
    if bits == 5:
        code |= (u8_at(at + 256 + byte) >> quad & 1) << 4
    elif bits == 6:
        code |= (u8_at(at + 256 + quad // 4 * 64 + byte) >> quad % 4 * 2 & 3) << 4
    return code


@numba.njit(error_model="numpy")
def _copy_column(out, source, column, columns, valid, size):
    """One number of `size` bytes of each of 16 rows."""
    for lane in range(16):
        here = source + (lane * columns + column) * size
        if size == 4:
            set_i32(out + lane * 4, i32_at(here) if lane < valid else 0)
        else:
            for i in range(size):
                set_u8(out + lane * size + i, u8_at(here + i) if lane < valid else 0)


@kernel("pack quantized")
def pack_quantized(arguments, tile, thread):
    """One tile of 16 rows with float scales; rows beyond the last are zero."""
    out, tile_bytes, packed, scales, biases, rows, inputs, bits, group_size, size, symmetric = unpack(
        arguments, "iiiiiiiiiii"
    )
    row_bytes, columns = inputs * bits // 8, inputs // group_size
    valid = min(rows - tile * 16, 16)
    at, source = out + tile * tile_bytes, packed + tile * 16 * row_bytes
    skip = tile * 16 * columns * size
    for group in range(columns):
        for start in range(group * group_size, (group + 1) * group_size, 32):
            _write_codes(at, source, row_bytes, valid, bits, start)
            at += 64 * bits
        _copy_column(at, scales + skip, group, columns, valid, size)
        at += 16 * size
        if not symmetric:
            _copy_column(at, biases + skip, group, columns, valid, size)
            at += 16 * size


@kernel("pack byte scales")
def pack_byte_scales(arguments, tile, thread):
    """One tile of 16 rows whose scales are bytes; biases are 0 for the symmetric kind, which has groups of 16."""
    out, tile_bytes, packed, scales, biases, factors, bias_factors, rows, inputs, bits = unpack(arguments, "iiiiiiiiii")
    row_bytes, supers = inputs * bits // 8, inputs // 256
    valid = min(rows - tile * 16, 16)
    at, source, first = out + tile * tile_bytes, packed + tile * 16 * row_bytes, tile * 16
    parts = 2 if biases == 0 else 1
    columns = inputs // 32 * parts
    for block in range(supers):
        _copy_column(at, factors + first * supers * 2, block, supers, valid, 2)
        at += 32
        if biases != 0:
            _copy_column(at, bias_factors + first * supers * 2, block, supers, valid, 2)
            at += 32
        for start in range(block * 256, block * 256 + 256, 32):
            _write_codes(at, source, row_bytes, valid, bits, start)
            at += 64 * bits
            for part in range(parts):
                _copy_column(at, scales + first * columns, start // 32 * parts + part, columns, valid, 1)
                at += 16
            if biases != 0:
                _copy_column(at, biases + first * columns, start // 32, columns, valid, 1)
                at += 16


@kernel("pack floats")
def pack_floats(arguments, tile, thread):
    """One tile [in][16 rows] of 2- or 4-byte floats; rows beyond the last are zero."""
    out, weight, rows, inputs, size = unpack(arguments, "iiiii")
    valid = min(rows - tile * 16, 16)
    at, source = out + tile * 16 * inputs * size, weight + tile * 16 * inputs * size
    for k in range(inputs):
        for lane in range(16):
            here = source + (lane * inputs + k) * size
            there = at + (k * 16 + lane) * size
            if size == 4:
                set_i32(there, i32_at(here) if lane < valid else 0)
            else:
                set_u8(there, u8_at(here) if lane < valid else 0)
                set_u8(there + 1, u8_at(here + 1) if lane < valid else 0)


@kernel("embed floats")
def embed_floats(arguments, tile, thread):
    """Row of token `tile`. kind: 0 float32, 1 float16, 2 bfloat16."""
    out, stride, table, _tile_bytes, rows, first, inputs, kind, scale = unpack(arguments, "iiiiiiiif")
    row = i32_at(rows + 4 * tile) + first
    size = 4 if kind == 0 else 2
    at = table + (row // 16 * 16 * inputs + row % 16) * size
    for k in range(inputs):
        here = at + k * 16 * size
        if kind == 0:
            x = f32_at(here)
        elif kind == 1:
            x = f16_at(here)
        else:
            x = bf16_at(here)
        set_f32(out + tile * stride + 4 * k, x * numba.float32(scale))


@kernel("embed quantized")
def embed_quantized(arguments, tile, thread):
    """Row of token `tile`, dequantized from float scales."""
    out, stride, table, tile_bytes, rows, first, inputs, bits, group_size, size, symmetric, scale = unpack(
        arguments, "iiiiiiiiiiif"
    )
    row = i32_at(rows + 4 * tile) + first
    lane = row % 16
    at = table + row // 16 * tile_bytes
    for group in range(inputs // group_size):
        scales = at + group_size * bits * 2 + lane * size
        step = f32_at(scales) if size == 4 else f16_at(scales)
        if symmetric:
            base = -numba.float32(1 << (bits - 1)) * step
        else:
            base = f32_at(scales + 64) if size == 4 else f16_at(scales + 32)
        for i in range(group_size):
            code = _read_code(at + i // 32 * 64 * bits, lane, bits, i % 32)
            x = (step * numba.float32(code) + base) * numba.float32(scale)
            set_f32(out + tile * stride + 4 * (group * group_size + i), x)
        at += group_size * bits * 2 + 16 * size * (1 if symmetric else 2)


@kernel("embed byte scales")
def embed_byte_scales(arguments, tile, thread):
    """Row of token `tile`, dequantized from scales in bytes."""
    out, stride, table, tile_bytes, rows, first, inputs, bits, symmetric, scale = unpack(arguments, "iiiiiiiiif")
    row = i32_at(rows + 4 * tile) + first
    lane = row % 16
    at = table + row // 16 * tile_bytes
    for block in range(inputs // 256):
        factor, bias_factor = f16_at(at + 2 * lane), f16_at(at + 32 + 2 * lane)
        at += 32 if symmetric else 64
        for start in range(block * 256, block * 256 + 256, 32):
            numbers = at + 64 * bits + lane
            for k in range(32):
                code = numba.float32(_read_code(at, lane, bits, k))
                if symmetric:
                    x = factor * i8_at(numbers + k // 16 * 16) * (code - numba.float32(1 << (bits - 1)))
                else:
                    x = factor * numba.float32(u8_at(numbers)) * code
                    x += bias_factor * numba.float32(u8_at(numbers + 16))
                set_f32(out + tile * stride + 4 * (start + k), x * numba.float32(scale))
            at += 64 * bits + 32
