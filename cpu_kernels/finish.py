"""What follows a matrix product: bias and residual."""

from __future__ import annotations

import numba

from cpu_kernels.simd import add, load_f32, store_f32


@numba.njit(error_model="numpy")
def finish(y, out, bias, residual):
    """Adds a row tile's bias and residual, where there are any (addresses, else 0), and stores it."""
    if bias != 0:
        y = add(y, load_f32(bias))
    if residual != 0:
        y = add(y, load_f32(residual))
    store_f32(out, y)
