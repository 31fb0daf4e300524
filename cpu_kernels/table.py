"""Where in a table of selected neurons its parts are: the groups of 32 that have any, and which.

int32: entries (groups with a selected neuron), selected neurons; 64 bytes in all
int32 [groups]: id of each entry's group, ascending
int32 [groups]: selected neurons of each entry, 1 to 32
int32 [groups][32]: each entry's selected neurons, ascending, the last repeated up to a multiple of 4
"""

from __future__ import annotations

import numba

from cpu_kernels.simd import i32_at

HEADER = 64


@numba.njit(error_model="numpy")
def group_of(table, entry):
    """The group of an entry."""
    return i32_at(table + HEADER + 4 * entry)


@numba.njit(error_model="numpy")
def count_of(table, groups, entry):
    """Selected neurons of an entry of a table for so many groups."""
    return i32_at(table + HEADER + 4 * (groups + entry))


@numba.njit(error_model="numpy")
def neurons_of(table, groups, entry):
    """Address of an entry's neurons."""
    return table + HEADER + 8 * groups + 128 * entry


@numba.njit(error_model="numpy")
def entry_count(table):
    """How many entries there are."""
    return i32_at(table)


@numba.njit(error_model="numpy")
def first_entry(table, piece, pieces):
    """Where one of `pieces` equal parts of the list begins; that of the part behind the last is the end."""
    return piece * entry_count(table) // pieces
