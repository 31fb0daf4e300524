"""Where the tiles of products with chosen neurons come from: weights of any form, unpacked to tiles of 16 rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numba

from cpu_kernels.compile import named
from cpu_kernels.float_rows import FloatRows
from cpu_kernels.input_layout import InputLayout
from cpu_kernels.row_layout import RowLayout
from cpu_kernels.simd import i64_at
from cpu_kernels.table import HEADER, count_of, entry_count, group_of, neurons_of
from cpu_kernels.tiles import Layout
from cpu_kernels.unpack_rows import unpack_float_rows, unpack_rows
from cpu_kernels.unpacked import group_bytes, unpack_listed, unpack_tile
from cpu_kernels.unpacked_inputs import unpack_inputs


@dataclass(frozen=True)
class Source:
    """Where the tiles of a product come from.

    Args:
        label: unlike that of any other.
        layout: whose unpacked tiles these are; None for floats [inputs][16 rows].
        unpack: Numba function that unpacks a tile. Its arguments are: where to; a tuple of the weights' address, that
            of numbers [int64] that the source wants to know of them, a table and its groups; and of down, the tile; of
            gate and up, the entry, the tile of the entry (those of gate, then those of up), and inputs. It returns the
            tile to fetch meanwhile.
    """

    label: str
    layout: Layout | None
    unpack: Callable

    @property
    def group_bytes(self) -> int:
        """Bytes of 32 inputs of an unpacked tile."""
        return group_bytes(self.layout) if self.layout else 32 * 64


@functools.cache
def blocks_of_up(layout: Layout, tiles: int) -> Source:
    """Gate and up in tiles, `tiles` for each 32 neurons. Their number: bytes of a tile."""
    unpack_row = unpack_tile(layout)

    @numba.njit(error_model="numpy")
    @named(f"{tiles} {layout.label}")
    def of_entry(unpacked, place, entry, part, inputs):
        weight, numbers, table, _ = place
        tile_bytes = i64_at(numbers)
        at = weight + (group_of(table, entry) * tiles + part) * tile_bytes
        unpack_row(unpacked, at, inputs // 32)
        if part < tiles - 1:
            return at + tile_bytes
        return weight + group_of(table, min(entry + 1, entry_count(table) - 1)) * tiles * tile_bytes

    return Source(f"blocks {layout.label}", layout, of_entry)


@functools.cache
def rows_of_up(layout: RowLayout | FloatRows) -> Source:
    """Gate and up by neuron."""
    unpack_part = unpack_rows if isinstance(layout, RowLayout) else unpack_float_rows
    first, last = unpack_part(layout, 0), unpack_part(layout, layout.parts - 1)

    @numba.njit(error_model="numpy")
    @named(layout.label)
    def of_entry(unpacked, place, entry, part, inputs):
        weight, _, table, groups = place
        skipped = part % 2 * 16
        neurons, count = neurons_of(table, groups, entry) + 4 * skipped, count_of(table, groups, entry) - skipped
        if part < 2:
            first(unpacked, weight, neurons, count)
        else:
            last(unpacked, weight, neurons, count)
        return weight

    return Source(f"rows {layout.label}", layout.tiles if isinstance(layout, RowLayout) else None, of_entry)


@functools.cache
def bands_of_down(layout: Layout) -> Source:
    """Down in tiles, in bands. Their number: bytes of a tile."""
    unpack_groups = unpack_listed(layout)
    band, next_tile = layout.band, layout.group_bytes

    @numba.njit(error_model="numpy")
    @named(layout.label)
    def of_row(unpacked, place, row):
        weight, numbers, table, _ = place
        at = weight + row // band * band * i64_at(numbers) + row % band * next_tile
        unpack_groups(unpacked, at, table + HEADER, entry_count(table))
        return at + band * i64_at(numbers)

    return Source(layout.label, layout, of_row)


@functools.cache
def inputs_of_down(layout: InputLayout) -> Source:
    """Down by inputs. Their numbers: `Places`."""
    unpack_entries = unpack_inputs(layout)

    @numba.njit(error_model="numpy")
    @named(layout.label)
    def of_row(unpacked, place, row):
        weight, numbers, table, groups = place
        places = (i64_at(numbers), i64_at(numbers + 8), i64_at(numbers + 16), i64_at(numbers + 24),
                  i64_at(numbers + 32), i64_at(numbers + 40))  # fmt: skip
        unpack_entries(unpacked, weight, places, row, table, groups)
        return weight

    return Source(layout.label, layout.unpacked if layout.bits else None, of_row)
