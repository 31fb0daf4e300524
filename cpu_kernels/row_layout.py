"""Quantized weights by neuron: all rows that one neuron needs are one piece of memory, for neurons that are picked singly.

A lane of a vector is a group of 32 inputs, so that one dot-product instruction adds to 16 groups of a row at once. A row
is cut into segments of 16 groups; what is left, rounded up to an even number of groups, into segments of 8, 4 and 2. A
segment of m groups is m / 2 vectors of codes:

    lane l of vector j holds quad (l // m) * (m / 2) + j (4 inputs each) of group l % m

With 8 bits they follow each other; with 4 bits, half as many bytes hold the first half of those bytes in their low
halves and the other in their high ones. A neuron's piece holds, for each of its rows (gate and up, or up alone) codes;
then for each of them the scales by group; then, unless symmetric, the biases. Groups of 64 or 128 inputs keep one scale,
which is spread over lanes when read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from cpu_kernels import simd
from cpu_kernels.simd import I8, I16, I32, SINGLE, offset
from cpu_kernels.tiles import Layout

SEGMENTS = (16, 8, 4, 2)
"""Groups of a segment, the widest first."""


def segments(inputs: int) -> list[tuple[int, int]]:
    """(first group, groups) of each segment of a row; the last may reach one group beyond the row."""
    found, groups = [], -(-inputs // 64) * 2
    while rest := groups - sum(m for _, m in found):
        found.append((groups - rest, next(m for m in SEGMENTS if m <= rest)))
    return found


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
    def code_bytes(self) -> int:
        """Bytes of the codes of a row, those of an odd last group doubled."""
        return -(-self.inputs // 64) * 8 * self.tiles.bits

    @property
    def number_bytes(self) -> int:
        """Bytes of the scales of a row."""
        size = max(self.tiles.group_size, 64)
        return -(-self.inputs // size) * (size // self.tiles.group_size) * self.tiles.scale_bytes

    @property
    def neuron_bytes(self) -> int:
        """Bytes of a neuron."""
        return self.parts * (self.code_bytes + self.number_bytes * (1 if self.tiles.symmetric else 2))

    def codes_at(self, part: int, group: int = 0) -> int:
        """Where in a neuron the codes of a row's segment begin, whose first group is given."""
        return part * self.code_bytes + group * 4 * self.tiles.bits

    def scales_at(self, part: int, group: int = 0) -> int:
        """Where in a neuron the scales of a row's segment begin."""
        numbers = self.parts * self.code_bytes + part * self.number_bytes
        return numbers + group * 32 // self.tiles.group_size * self.tiles.scale_bytes

    def biases_at(self, part: int, group: int = 0) -> int:
        """Where in a neuron the biases of a row's segment begin."""
        return self.scales_at(part, group) + self.parts * self.number_bytes

    # What follows writes LLVM IR.

    def stored(self, b: Any, address: Any, m: int) -> list[tuple[Any, Any]]:
        """(address, vector) of the bytes of a segment's codes as they are in memory."""
        nbytes = m * 4 * self.tiles.bits
        kind = ir.VectorType(I8, min(nbytes, 64))
        places = [offset(b, address, at) for at in range(0, nbytes, 64)]
        return [(at, b.load(simd.pointer(b, at, kind), align=1)) for at in places]

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
        few = b.load(simd.pointer(b, address, raw), align=raw.element.width // 8 if raw.element is I16 else 4)
        order = ir.Constant(ir.VectorType(I32, 16), [lane % m // each for lane in range(16)])
        spread = few if m // each == 16 else b.shuffle_vector(few, few, order)
        return simd._widen(b, spread) if self.tiles.kind == "f16" else spread
