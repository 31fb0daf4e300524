"""Quantized weights by neuron: all rows that a neuron needs are one piece of memory, for neurons that are picked singly.

A neuron has one row or two (gate and up). A lane of a vector is a group of 32 inputs, so that one dot-product
instruction adds to 16 groups of a row at once. Groups are put in this order: of each row as many as make whole segments
of 16, then what is left of each row, which together make segments of 16, 8, 4 and 2 (an odd last group has a partner of
zeros). A neuron's piece is the codes of its groups in this order, then their scales, then, unless symmetric, their
biases. Groups of 64 or 128 inputs keep one scale, which is spread over lanes when read.

The codes of a segment of m groups are m / 2 vectors of 16 quads (4 inputs each):

    lane l of vector j holds quad (l // m) * (m / 2) + j of the segment's group l % m

With 8 bits these bytes follow each other; with 4 bits, half as many hold the first half of them in their low halves and
the other in their high ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from cpu_kernels import simd
from cpu_kernels.simd import I8, I16, I32, SINGLE, offset
from cpu_kernels.tiles import Layout


@dataclass(frozen=True, slots=True)
class RowLayout:
    """How quantized neurons are written.

    Args:
        tiles: bits, group size, kind of scales ("f16" or "f32") and symmetry; also what the rows are as tiles.
        inputs: of a row, a multiple of 32.
        parts: rows of a neuron: 2 for gate and up, 1 for up alone.
    """

    tiles: Layout
    inputs: int
    parts: int

    @property
    def label(self) -> str:
        """A name for kernels."""
        return f"{self.tiles.label} {self.parts} of {self.inputs}"

    @property
    def whole(self) -> int:
        """Groups of a row that make whole segments."""
        return self.inputs // 512 * 16

    @property
    def rest(self) -> int:
        """Groups of a row that are left."""
        return self.inputs // 32 - self.whole

    @property
    def rest_segments(self) -> list[tuple[int, int]]:
        """Place among the neuron's groups, and number of groups, of each segment of what is left."""
        found, at = [], self.parts * self.whole
        while at < self._groups:
            m = next(m for m in (16, 8, 4, 2) if m <= self._groups - at)
            found.append((at, m))
            at += m
        return found

    def owner(self, place: int) -> tuple[int, int]:
        """Row and group of a place in what is left; no group of any row for the partner of an odd last group."""
        part, group = divmod(place - self.parts * self.whole, self.rest)
        return part, self.whole + group

    @property
    def _groups(self) -> int:
        count = self.parts * self.inputs // 32
        return count + count % 2

    @property
    def _number_bytes(self) -> int:
        return self._groups * 32 // self.tiles.group_size * self.tiles.scale_bytes

    @property
    def neuron_bytes(self) -> int:
        """Bytes of a neuron."""
        return self.biases_at(0) + (0 if self.tiles.symmetric else self._number_bytes)

    def codes_at(self, place: int) -> int:
        """Where in a neuron the codes of its groups begin, from the given one on."""
        return place * 4 * self.tiles.bits

    def scales_at(self, place: int) -> int:
        """Where in a neuron the scales of its groups begin."""
        return self.codes_at(self._groups) + place * 32 // self.tiles.group_size * self.tiles.scale_bytes

    def biases_at(self, place: int) -> int:
        """Where in a neuron the biases of its groups begin."""
        return self.scales_at(place) + self._number_bytes

    # What follows writes LLVM IR.

    def stored(self, b: Any, address: Any, m: int) -> list[Any]:
        """The bytes of a segment's codes as they are in memory, as vectors."""
        nbytes = m * 4 * self.tiles.bits
        kind = ir.VectorType(I8, min(nbytes, 64))
        return [b.load(simd.pointer(b, offset(b, address, at), kind), align=1) for at in range(0, nbytes, 64)]

    def codes(self, b: Any, stored: list[Any]) -> list[Any]:
        """The m / 2 vectors of codes in a segment's bytes."""
        if self.tiles.bits == 8:
            return stored
        count = stored[0].type.count
        low = [b.and_(v, ir.Constant(v.type, [15] * count)) for v in stored]
        high = [b.lshr(v, ir.Constant(v.type, [4] * count)) for v in stored]
        if count == 64:
            return [*low, *high]
        return [b.shuffle_vector(low[0], high[0], ir.Constant(ir.VectorType(I32, 64), list(range(64))))]

    def numbers(self, b: Any, address: Any, m: int) -> Any:
        """Scales or biases of a segment as floats, each in all lanes of its group."""
        each = self.tiles.group_size // 32
        raw = ir.VectorType(I16 if self.tiles.kind == "f16" else SINGLE, m // each)
        few = b.load(simd.pointer(b, address, raw), align=self.tiles.scale_bytes)
        order = ir.Constant(ir.VectorType(I32, 16), [lane % m // each for lane in range(16)])
        spread = few if m // each == 16 else b.shuffle_vector(few, few, order)
        return simd._widen(b, spread) if self.tiles.kind == "f16" else spread
