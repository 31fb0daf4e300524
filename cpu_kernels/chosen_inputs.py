"""One token's inputs that a table lists, as products with weights by inputs want them.

They are compact: [entries][32] floats, an entry's neurons in the table's order and zeros behind.
"""

from __future__ import annotations

import numba

from cpu_kernels.codes import quantize_rows
from cpu_kernels.compile import kernel, unpack
from cpu_kernels.simd import f32_at, i32_at, set_f32
from cpu_kernels.table import count_of, neurons_of

F32 = numba.float32


@numba.njit(error_model="numpy")
def _gather(out, x, table, groups):
    for e in range(i32_at(table)):
        count, neurons = count_of(table, groups, e), neurons_of(table, groups, e)
        for i in range(32):
            set_f32(out + 128 * e + 4 * i, f32_at(x + 4 * i32_at(neurons + 4 * i)) if i < count else F32(0))


@kernel("gather chosen")
def gather_chosen(arguments, tile, thread):
    """Makes each thread's own compact copy of a row."""
    out, out_each, x, table, groups = unpack(arguments, "iiiii")
    _gather(out + thread * out_each, x, table, groups)


@kernel("quantize chosen")
def quantize_chosen(arguments, tile, thread):
    """Makes each thread's own codes of a row; `row` is memory to gather it in first, 0 if x is compact."""
    panels, each, x, table, groups, row, row_each = unpack(arguments, "iiiiiii")
    if row != 0:
        _gather(row + thread * row_each, x, table, groups)
        x = row + thread * row_each
    n = 32 * i32_at(table)
    quantize_rows(x, 4 * n, 1, panels + thread * each, n, 1)
