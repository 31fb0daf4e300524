"""What a table of chosen neurons says: its entries are the groups of 32 neurons that have a chosen one, in order."""

from __future__ import annotations

import numba

from cpu_kernels.simd import i32_at

HEADER = 64
"""Bytes before the list of groups: int32 n, the number of entries, and the number of chosen neurons."""


@numba.njit(error_model="numpy")
def entry_count(table):
    """How many entries there are."""
    return i32_at(table)


@numba.njit(error_model="numpy")
def group_of(table, entry):
    """The group of an entry."""
    return i32_at(table + HEADER + 4 * entry)


@numba.njit(error_model="numpy")
def first_entry(table, piece, pieces):
    """Where one of `pieces` equal parts of the list begins; that of the part behind the last is the end."""
    return piece * entry_count(table) // pieces
