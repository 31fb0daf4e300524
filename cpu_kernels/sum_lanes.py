"""Sums over the lanes of several vectors at once."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from cpu_kernels.simd import I32, LANES


def sums_of_each(b: Any, vectors: list[Any]) -> Any:
    """Builds one vector of the sums of 2, 4, 8 or 16 vectors: lanes 8 apart are added, then 4, 2 and 1.

    The order is the same for every vector, wherever it stands and whatever the CPU.
    """
    width = LANES
    while width > 1:
        width //= 2
        pairs = list(zip(vectors[::2], vectors[1::2])) if len(vectors) > 1 else [(vectors[0], vectors[0])]
        blocks = range(0, (2 if len(vectors) > 1 else 1) * vectors[0].type.count, 2 * width)
        halves = [[at + i + half for at in blocks for i in range(width)] for half in (0, width)]
        kind = ir.VectorType(I32, len(halves[0]))
        vectors = [b.fadd(*(b.shuffle_vector(x, y, ir.Constant(kind, h)) for h in halves)) for x, y in pairs]
    return vectors[0]
