"""The table of a selection of FFN neurons: what kernels read that compute no others.

Neurons stand in groups of 32 in the model's order, which are the quantization groups of the down projection's input;
D neurons are G = ceil(D / 32) groups. A group with a selected neuron is an entry. All int32:

    [0] n, the number of entries; [1] selected neurons; 64 bytes in all
    [G] groups of the entries, ascending
    [G] how many neurons each has
    [G][32] an entry's neurons, ascending, filled up to a multiple of 4 with the last
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir

from cpu_kernels.atomics import atomic_add
from cpu_kernels.compile import kernel, unpack
from cpu_kernels.masks import expand, highest_bit, low_bits, popcount, random_mask, words
from cpu_kernels.simd import I8, I32, VOID, A, i64_at, op, pointer, set_i32, set_i64, splat

HEADER = 64
"""Bytes before the groups."""
SPARE = 16
"""Bytes behind a table that may be written to."""
STATISTICS = 5
"""int64 that may count what tables hold: entries, neurons, tables, the neurons of each row, and rows."""


def groups_of(neurons: int) -> int:
    """Groups of 32."""
    return -(-neurons // 32)


def table_bytes(neurons: int) -> int:
    """Bytes of a table, with what may be written to behind it."""
    return HEADER + groups_of(neurons) * (8 + 128) + SPARE


def everything(neurons: int) -> np.ndarray:
    """The table [int32] that selects every neuron."""
    groups = groups_of(neurons)
    table = np.zeros(table_bytes(neurons) // 4, np.int32)
    table[:2] = groups, neurons
    parts = table[HEADER // 4 : (table_bytes(neurons) - SPARE) // 4]
    parts[:groups] = np.arange(groups)
    parts[groups : 2 * groups] = np.minimum(neurons - 32 * np.arange(groups), 32)
    parts[2 * groups :] = np.minimum(np.arange(32 * groups), neurons - 1)
    return table


def _positions() -> np.ndarray:
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.argsort(1 - bits, axis=1, kind="stable").astype(np.uint8)


POSITIONS = _positions()
"""Of every byte [256] the places of its bits that are 1, then the others."""


@op(VOID(A, A, A))
def _store_positions(b, out, positions, base):
    """8 bytes, each added to `base`, as int32."""
    places = b.load(pointer(b, positions, ir.VectorType(I8, 8)), align=1)
    eight = ir.VectorType(I32, 8)
    b.store(b.add(b.zext(places, eight), splat(b, b.trunc(base, I32), 8)), pointer(b, out, eight), align=4)


@op(VOID(A, A))
def _store_four(b, out, x):
    four = splat(b, b.trunc(x, I32), 4)
    b.store(four, pointer(b, out, four.type), align=4)


@numba.njit(error_model="numpy")
def _entry(table, groups, n, group, bits, positions):
    """Writes a group as entry n, which the next one overwrites if the group has no neuron."""
    count = table + HEADER + 4 * groups + 4 * n
    set_i32(count - 4 * groups, group)
    set_i32(count, popcount(bits))
    out = table + HEADER + 8 * groups + 128 * n
    for first in range(0, 32, 8):
        byte = bits >> first & 255
        _store_positions(out, positions + 8 * byte, 32 * group + first)
        out += 4 * popcount(byte)
    # May reach into the next entry, which is not written yet.
    _store_four(out, 32 * group + highest_bit(bits | 1))


@numba.njit(error_model="numpy")
def _union(masks, rows, each, word):
    bits = 0
    for row in range(rows):
        bits |= i64_at(masks + row * each + 8 * word)
    return bits


@numba.njit(error_model="numpy")
def _neurons_of_rows(masks, rows, each, block):
    selected = 0
    for at in range(0, rows * each, 8):
        selected += popcount(i64_at(masks + at))
    return selected * block


@numba.njit(error_model="numpy")
def make_table(table, masks, rows, block, neurons, positions, statistics):
    """Makes the table of all neurons that any of the masks selects.

    Args:
        masks: rows of bits of blocks.
        block: neurons of a block: 1, or a multiple of 32.
        positions: address of POSITIONS.
        statistics: address of STATISTICS int64 to add to; or 0.
    """
    groups, each = (neurons + 31) >> 5, 8 * words((neurons + block - 1) // block)
    n, total = 0, 0
    if block == 1:
        for word in range(words(neurons)):
            bits = _union(masks, rows, each, word)
            for half in range(min(groups - 2 * word, 2)):
                part = bits >> 32 * half & 0xFFFFFFFF
                _entry(table, groups, n, 2 * word + half, part, positions)
                n += part != 0
            total += popcount(bits)
    else:
        per_block = block >> 5
        for unit in range((neurons + block - 1) // block):
            if _union(masks, rows, each, unit >> 6) >> (unit & 63) & 1:
                for group in range(unit * per_block, min((unit + 1) * per_block, groups)):
                    part = low_bits(min(neurons - 32 * group, 32))
                    _entry(table, groups, n, group, part, positions)
                    n += 1
                    total += popcount(part)
    set_i32(table, n)
    set_i32(table + 4, total)
    if statistics != 0:
        set_i64(statistics, i64_at(statistics) + n)
        set_i64(statistics + 8, i64_at(statistics + 8) + total)
        set_i64(statistics + 16, i64_at(statistics + 16) + 1)
        own = total
        if rows > 1:
            own = _neurons_of_rows(masks, rows, each, block)
        set_i64(statistics + 24, i64_at(statistics + 24) + own)
        set_i64(statistics + 32, i64_at(statistics + 32) + rows)


@numba.njit(error_model="numpy")
def finish_selection(arguments, row):
    """What follows the making of a mask's row: a random one instead, neurons instead of blocks, the table.

    The table is made by whoever is the last to finish a row, so that a selection is one operation.

    Args:
        arguments: address of: masks, units, rows; place of the rows' random states (or 0) and units that they select;
            masks of neurons to be made (or 0), neurons of a unit, neurons; table (or 0), a zero to count finished rows
            with, address of POSITIONS, statistics (or 0).
    """
    (masks, units, rows, states, kept, wide, block, neurons, table, finished, positions, statistics) = unpack(
        arguments, "iiiiiiiiiiii"
    )
    mask = masks + 8 * row * words(units)
    if states != 0:
        random_mask(mask, units, kept, states + 8 * row)
    if wide != 0:
        expand(wide + 8 * row * words(neurons), neurons, mask, block)
    if table != 0 and (rows == 1 or atomic_add(finished, 1) == rows - 1):
        set_i64(finished, 0)
        if wide != 0:
            masks, block = wide, 1
        make_table(table, masks, rows, block, neurons, positions, statistics)


@kernel("finish selection")
def chosen(arguments, tile, thread):
    """Does the rest for a mask that was made before."""
    finish_selection(arguments, tile)
