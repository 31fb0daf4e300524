"""Quantized weights by neuron, for neurons that are picked singly: all that one needs is one piece of memory.

A neuron has one row or two (gate and up). A lane of a vector is a group of 32 inputs, so that one dot-product
instruction adds to 16 groups of a row at once. Such 16 groups are a segment; what is left of all rows of a neuron makes
segments of 16, 8, 4 and 2 groups together (an odd last group has a partner of zeros). A neuron is a run of blocks, in
the order in which they are read: first the segments of 16 groups of each row that belong to the same inputs, then, in
blocks of their own, those of what is left. A block holds codes by segment, then scales, then, unless symmetric, biases.
Groups of 64 or 128 inputs keep one scale, which is spread over lanes when read.

The codes of a segment of m groups are m / 2 vectors of 16 quads (4 inputs each):

    lane l of vector j holds quad (l // m) * (m / 2) + j of the segment's group l % m

With 8 bits these bytes follow each other; with 4 bits, half as many hold the first half of them in their low halves and
the other in their high ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llvmlite import ir

from cpu_kernels import simd
from cpu_kernels.simd import I8, I16, I32, SINGLE, offset
from cpu_kernels.tiles import Layout


def _nibbles(b: Any, v: Any) -> list[Any]:
    """Low and high halves of bytes."""
    fifteen, four = (ir.Constant(v.type, [n] * v.type.count) for n in (15, 4))
    return [b.and_(v, fifteen), b.lshr(v, four)]


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Segments of a neuron that are written together.

    Args:
        tiles: bits, group size, kind of scales and symmetry.
        at: bytes from the neuron's first.
        m: groups of a segment.
        owners: row and group of each group of the first segment; None for the partner of an odd last group.
        segments: how many; those after the first belong to the same groups of the following rows.
    """

    tiles: Layout
    at: int
    m: int
    owners: tuple[tuple[int, int] | None, ...]
    segments: int

    @property
    def _codes(self) -> int:
        return self.m * 4 * self.tiles.bits

    @property
    def _numbers(self) -> int:
        return self.m * 32 // self.tiles.group_size * self.tiles.scale_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the block."""
        return self.segments * (self._codes + self._numbers * (1 if self.tiles.symmetric else 2))

    @property
    def vectors(self) -> int:
        """Vectors of memory that a segment's codes fill, at least 1."""
        return -(-self._codes // 64)

    @property
    def lanes(self) -> int:
        """Lanes of such a vector that are filled: 16, or 8."""
        return min(self._codes, 64) // 4

    def codes_at(self, segment: int) -> int:
        """Where in the block a segment's codes are."""
        return segment * self._codes

    def scales_at(self, segment: int) -> int:
        """Where in the block a segment's scales are."""
        return self.segments * self._codes + segment * self._numbers

    def biases_at(self, segment: int) -> int:
        """Where in the block a segment's biases are."""
        return self.scales_at(self.segments + segment)

    # What follows writes LLVM IR.

    def codes(self, b: Any, block: Any, segment: int) -> list[Any]:
        """The m / 2 vectors of codes of a segment."""
        starts = range(self.codes_at(segment), self.codes_at(segment + 1), 64)
        stored = [self._load(b, offset(b, block, at)) for at in starts]
        if self.tiles.bits == 8:
            return stored
        low, high = zip(*(_nibbles(b, v) for v in stored))
        if self.lanes == 16:
            return [*low, *high]
        return [b.shuffle_vector(low[0], high[0], ir.Constant(ir.VectorType(I32, 64), list(range(64))))]

    def _load(self, b: Any, address: Any) -> Any:
        kind = ir.VectorType(I8, 4 * self.lanes)
        return b.load(simd.pointer(b, address, kind), align=1)

    def words(self, b: Any, address: Any) -> Any:
        """One of those vectors as i32x16."""
        v = self._load(b, address)
        if self.lanes < 16:
            v = b.shuffle_vector(v, v, ir.Constant(ir.VectorType(I32, 64), [i % 32 for i in range(64)]))
        return b.bitcast(v, simd.I.llvm)

    def quads(self, b: Any, lane: int, word: Any) -> list[tuple[int, int, Any]]:
        """(vector, lane, codes) of the quads in a lane of the first vector of memory.

        Args:
            word: bytes, whose quads are those of that lane in 16 rows. Those of further vectors of memory belong to
                vectors as much further on.
        """
        if self.tiles.bits == 8:
            return [(0, lane, word)]
        places = (lane, lane + 4 * self.m)
        return [(place // 16, place % 16, codes) for place, codes in zip(places, _nibbles(b, word))]

    def numbers(self, b: Any, address: Any) -> Any:
        """Scales or biases of a segment as floats, each in all lanes of its group."""
        each = self.tiles.group_size // 32
        raw = ir.VectorType(I16 if self.tiles.kind == "f16" else SINGLE, self.m // each)
        few = b.load(simd.pointer(b, address, raw), align=self.tiles.scale_bytes)
        order = ir.Constant(ir.VectorType(I32, 16), [lane % self.m // each for lane in range(16)])
        spread = few if self.m // each == 16 else b.shuffle_vector(few, few, order)
        return simd._widen(b, spread) if self.tiles.kind == "f16" else spread


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
    def whole(self) -> RowBlock:
        """The first of the blocks with 16 groups of each row."""
        return RowBlock(self.tiles, 0, 16, tuple((0, group) for group in range(16)), self.parts)

    @property
    def n_whole(self) -> int:
        """How many such blocks there are, one after the other."""
        return self.inputs // 512

    @property
    def rest(self) -> list[RowBlock]:
        """The blocks of what is left."""
        first, end = self.n_whole * 16, self.inputs // 32
        owners: list[Any] = [(part, group) for part in range(self.parts) for group in range(first, end)]
        owners += [None] * (len(owners) % 2)
        found, at = [], self.n_whole * self.whole.nbytes
        while owners:
            m = next(m for m in (16, 8, 4, 2) if m <= len(owners))
            found.append(RowBlock(self.tiles, at, m, tuple(owners[:m]), 1))
            owners, at = owners[m:], at + found[-1].nbytes
        return found

    @property
    def neuron_bytes(self) -> int:
        """Bytes of a neuron."""
        return self.n_whole * self.whole.nbytes + sum(block.nbytes for block in self.rest)

    def runs(self, part: int) -> list[tuple[RowBlock, int, int, int, int]]:
        """Where the groups of a row are: block, segment, lane of the first, its group, and how many, in order."""
        found = []
        for i in range(self.n_whole):
            found.append((replace(self.whole, at=i * self.whole.nbytes), part, 0, 16 * i, 16))
        for block in self.rest:
            lanes = [lane for lane, owner in enumerate(block.owners) if owner and owner[0] == part]
            if lanes:
                found.append((block, 0, lanes[0], block.owners[lanes[0]][1], len(lanes)))
        return found
