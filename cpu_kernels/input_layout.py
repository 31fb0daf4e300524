"""Weights by inputs: the values of one input for all outputs lie together, so that products with a few inputs read
only theirs.

A matrix is a run of groups of inputs (32 for floats, else those that share scales). A group holds

    scales [outputs], then biases [outputs] (neither for floats, no biases if symmetric), up to a whole cache line
    [inputs of the group][wide segments], then [inputs of the group][narrow segments], up to a whole cache line

A wide segment holds one input's values for 4 vectors of outputs (8 if they have 4 bits), a narrow one, for outputs that
fill no wide one, for 2 of integers (4) or 1 of floats. Outputs and inputs that do not exist are 0. Bytes of integers
are in such an order that interleaving those of four inputs, which CPUs do within 16 bytes, gives vectors [16
outputs][4 inputs] for dot products: see `byte_of`. Of 4 bits, the second half of a segment's outputs are the high
halves of the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
from llvmlite import ir

from cpu_kernels import simd
from cpu_kernels.simd import I8, I16, I32, B
from cpu_kernels.tiles import Layout

LINE = 64


@numba.njit(error_model="numpy")
def byte_of(vector, lane, wide):
    """Which byte of a segment of integers holds one of the 16 outputs of one of its vectors."""
    runs = 4 if wide else 2
    quad = lane // 4
    return quad % runs * 16 + (4 // runs * vector + quad // runs) * 4 + lane % 4


class Places(NamedTuple):
    """Where in a group its parts are.

    Args:
        wide, narrow: segments of an input.
        biases, rows, narrow_rows: bytes from the group's start to its biases and segments.
        group_bytes: of a whole group.
    """

    wide: int
    narrow: int
    biases: int
    rows: int
    narrow_rows: int
    group_bytes: int


@dataclass(frozen=True, slots=True)
class InputLayout:
    """How the values of a matrix are written by inputs.

    Args:
        bits: 4 or 8; 0 for floats.
        group_size: inputs of a group: 32, 64 or 128; 32 for floats.
        kind: of scales, or of floats: "f32", "f16" or (floats only) "bf16".
        symmetric: no biases, codes relative to the middle of their range.
    """

    bits: int
    group_size: int
    kind: str
    symmetric: bool

    @property
    def label(self) -> str:
        """A name for kernels."""
        if not self.bits:
            return f"{self.kind} by inputs"
        return f"{self.bits}-bit {self.kind}/{self.group_size}{' symmetric' if self.symmetric else ''} by inputs"

    @property
    def unpacked(self) -> Layout:
        """The layout of tiles that hold the same numbers, for each 32 inputs."""
        return Layout(self.bits, 32, self.kind, self.symmetric)

    @property
    def number_bytes(self) -> int:
        """Bytes of a scale, bias or float."""
        return 4 if self.kind == "f32" else 2

    def vectors(self, wide: bool) -> int:
        """Vectors of 16 outputs in a segment."""
        if not self.bits:
            return 4 if wide else 1
        return (4 if wide else 2) * (2 if self.bits == 4 else 1)

    def outputs(self, wide: bool) -> int:
        """Outputs of a segment."""
        return 16 * self.vectors(wide)

    def segment_bytes(self, wide: bool) -> int:
        """Bytes of a segment of one input."""
        return self.outputs(wide) * (self.bits or 8 * self.number_bytes) // 8

    def places(self, outputs: int) -> Places:
        """The parts of a group of so many outputs."""
        wide, rest = divmod(outputs, self.outputs(True))
        narrow = -(-rest // self.outputs(False))
        numbers = (wide * self.outputs(True) + narrow * self.outputs(False)) * self.number_bytes if self.bits else 0
        rows = _lines(numbers * (1 if self.symmetric else 2))
        narrow_rows = rows + self.group_size * wide * self.segment_bytes(True)
        end = narrow_rows + self.group_size * narrow * self.segment_bytes(False)
        return Places(wide, narrow, numbers, rows, narrow_rows, _lines(end))

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a matrix."""
        return -(-inputs // self.group_size) * self.places(outputs).group_bytes


def _lines(nbytes: int) -> int:
    return -(-nbytes // LINE) * LINE


# What follows writes LLVM IR.


def interleaved(b: Any, rows: list[Any], wide: bool) -> list[Any]:
    """Bytes of a segment of 4 inputs, whose addresses these are, as vectors i8x64 of [16 outputs][4 inputs]."""
    kind = ir.VectorType(I8, 64 if wide else 32)
    v = [b.load(simd.pointer(b, row, kind), align=1) for row in rows]
    words = ir.VectorType(I16, kind.count // 2)
    pairs = [[b.bitcast(_merged(b, *v[i : i + 2], start), words) for i in (0, 2)] for start in (0, 8)]
    quads = [_merged(b, *pair, start) for pair in pairs for start in (0, 4)]
    if not wide:
        both = ir.Constant(ir.VectorType(I32, 32), list(range(32)))
        quads = [b.shuffle_vector(*quads[i : i + 2], both) for i in (0, 2)]
    return [b.bitcast(v, B.llvm) for v in quads]


def _merged(b: Any, x: Any, y: Any, start: int) -> Any:
    """Elements of x and y in turn: of each 16 bytes, 8 from element `start` on."""
    n, run = x.type.count, 128 // x.type.element.width
    order = [at + i + which for at in range(start, n, run) for i in range(run // 2) for which in (0, n)]
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, n), order))
