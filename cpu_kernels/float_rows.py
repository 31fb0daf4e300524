"""Float weights by neuron, and the products of neurons' rows with one token."""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir
from numba.core import cgutils

from cpu_kernels import simd
from cpu_kernels.float_linear import LOADS
from cpu_kernels.simd import I64, offset


@dataclass(frozen=True, slots=True)
class FloatRows:
    """How float neurons are written: their rows one after the other, each with zeros up to a whole vector.

    Args:
        kind: "f32", "f16" or "bf16".
        inputs: of a row.
        parts: rows of a neuron: 2 for gate and up, 1 for up alone.
    """

    kind: str
    inputs: int
    parts: int

    @property
    def label(self) -> str:
        """A name for kernels."""
        return f"{self.kind} {self.parts} of {self.inputs}"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return -(-self.inputs // 16) * 16 * LOADS[self.kind][1]

    @property
    def neuron_bytes(self) -> int:
        """Bytes of a neuron."""
        return self.parts * self.row_bytes


def float_products(b, layout, neuron, ahead, x):
    """Builds the sums by lane of each row of a neuron.

    Args:
        neuron: its address.
        ahead: distance from there to what is to be fetched.
        x: address of the token's floats.
    """
    load, size = LOADS[layout.kind]
    rows = [offset(b, neuron, part * layout.row_bytes) for part in range(layout.parts)]
    totals = [cgutils.alloca_once(b, simd.F.llvm) for _ in rows]
    for total in totals:
        b.store(simd.floats(0), total)

    def column(k, v):
        for row, total in zip(rows, totals):
            at = b.add(row, b.mul(k, I64(16 * size)))
            simd.prefetch_l2.build(b, b.add(at, ahead))
            b.store(simd.fma.build(b, load.build(b, at), v, b.load(total)), total)

    whole, rest = divmod(layout.inputs, 16)
    with cgutils.for_range(b, I64(whole)) as loop:
        column(loop.index, simd.load_f32.build(b, b.add(x, b.mul(loop.index, I64(64)))))
    if rest:
        # What lies behind a row of activations may be NaN, which a weight of 0 would keep.
        inside = ir.Constant(ir.VectorType(ir.IntType(1), 16), [int(lane < rest) for lane in range(16)])
        last = simd.load_f32.build(b, offset(b, x, 64 * whole))
        column(I64(whole), b.select(inside, last, simd.floats(0)))
    return [b.load(total) for total in totals]
