"""Weights from their canonical form into the tiles of `linear.py`, and single rows back out of them."""

from __future__ import annotations

import numba

from cpu_kernels.compile import kernel, unpack
from cpu_kernels.simd import bf16_at, f16_at, f32_at, i32_at, set_f16, set_f32, set_i32, set_u8, u8_at


@numba.njit(error_model="numpy")
def _code(row, bits, i):
    """Code of input i in a canonical row."""
    if bits == 8:
        return u8_at(row + i)
    return (u8_at(row + i // 2) >> (4 * (i % 2))) & 15


@numba.njit(error_model="numpy")
def _copy_scales(out, source, column, columns, valid, wide):
    for lane in range(16):
        at = source + (lane * columns + column) * (4 if wide else 2)
        if wide:
            set_f32(out + 4 * lane, f32_at(at) if lane < valid else numba.float32(0))
        else:
            set_f16(out + 2 * lane, f16_at(at) if lane < valid else numba.float32(0))


@kernel("pack quantized")
def pack_quantized(arguments, tile, thread):
    """One tile of 16 rows; rows beyond the last are zero."""
    out, tile_bytes, packed, scales, biases, rows, inputs, bits, group_size, wide, symmetric = unpack(
        arguments, "iiiiiiiiiii"
    )
    row_bytes, columns, size = inputs * bits // 8, inputs // group_size, 4 if wide else 2
    valid = min(rows - tile * 16, 16)
    at = out + tile * tile_bytes
    source = packed + tile * 16 * row_bytes
    for group in range(columns):
        for start in range(group * group_size, (group + 1) * group_size, 32):
            for quad in range(bits):
                for lane in range(16):
                    row = source + lane * row_bytes
                    for i in range(4):
                        value = 0
                        if lane < valid:
                            value = _code(row, bits, start + quad * 4 + i)
                            if bits == 4:
                                value |= _code(row, bits, start + 16 + quad * 4 + i) << 4
                        set_u8(at + lane * 4 + i, value)
                at += 64
        skip = (tile * 16 * columns) * size
        _copy_scales(at, scales + skip, group, columns, valid, wide)
        at += 16 * size
        if not symmetric:
            _copy_scales(at, biases + skip, group, columns, valid, wide)
            at += 16 * size


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
    out, stride, table, rows, first, inputs, kind, scale = unpack(arguments, "iiiiiiif")
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
    """Row of token `tile`, dequantized."""
    out, stride, table, tile_bytes, rows, first, inputs, bits, group_size, wide, symmetric, scale = unpack(
        arguments, "iiiiiiiiiiif"
    )
    row = i32_at(rows + 4 * tile) + first
    lane = row % 16
    at = table + row // 16 * tile_bytes
    size = 4 if wide else 2
    zero = numba.float32(1 << (bits - 1))
    for group in range(inputs // group_size):
        scales = at + group_size * bits * 2 + lane * size
        step = f32_at(scales) if wide else f16_at(scales)
        if symmetric:
            base = -zero * step
        elif wide:
            base = f32_at(scales + 64)
        else:
            base = f16_at(scales + 32)
        for i in range(group_size):
            inner = i % 32
            block = at + i // 32 * 64 * bits
            if bits == 8:
                code = u8_at(block + inner // 4 * 64 + lane * 4 + inner % 4)
            else:
                code = u8_at(block + inner % 16 // 4 * 64 + lane * 4 + inner % 4) >> (inner // 16 * 4) & 15
            x = (step * numba.float32(code) + base) * numba.float32(scale)
            set_f32(out + tile * stride + 4 * (group * group_size + i), x)
        at += group_size * bits * 2 + 16 * size * (1 if symmetric else 2)
