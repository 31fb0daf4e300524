"""Sixteen vectors of 16 lanes, seen as a matrix, turned over."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from cpu_kernels.simd import I32, LANES


def _order(quads: list[list[int]]) -> Any:
    """Lanes of two joined vectors, four for each 128 bits of the result."""
    return ir.Constant(ir.VectorType(I32, LANES), [lane for quad in quads for lane in quad])


_PAIRS = [_order([[4 * q + at, 16 + 4 * q + at, 4 * q + at + 1, 17 + 4 * q + at] for q in range(4)]) for at in (0, 2)]
"""One lane of each vector in turn, from within the same 128 bits of both: the first two of four lanes, the last two."""
_HALVES = [_order([[4 * q + at, 4 * q + at + 1, 16 + 4 * q + at, 17 + 4 * q + at] for q in range(4)]) for at in (0, 2)]
_QUADS = [_order([[4 * q + i for i in range(4)] for q in (at, at + 2, at + 4, at + 6)]) for at in (0, 1)]
"""Every other 128 bits of both vectors."""


def _both(b: Any, x: Any, y: Any, orders: list[Any]) -> list[Any]:
    return [b.shuffle_vector(x, y, order) for order in orders]


def transpose(b: Any, rows: list[Any]) -> list[Any]:
    """Builds the 16 columns of 16 vectors of 16 lanes."""
    found: list[Any] = [None] * LANES
    fours = []
    for at in range(0, LANES, 4):
        first, second = (_both(b, *rows[i : i + 2], _PAIRS) for i in (at, at + 2))
        # Vector c of a four: in each 128 bits, lane c of what its four rows have there.
        fours.append([v for x, y in zip(first, second) for v in _both(b, x, y, _HALVES)])
    for c, column in enumerate(zip(*fours)):
        even, odd = zip(*(_both(b, *column[i : i + 2], _QUADS) for i in (0, 2)))
        for q, pair in enumerate((even, odd)):
            found[4 * q + c], found[4 * q + 8 + c] = _both(b, *pair, _QUADS)
    return found
