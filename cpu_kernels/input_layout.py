"""Weights by inputs: the values of one input for all outputs lie together, so that products with a few inputs read
only theirs.

A matrix is a run of groups of inputs (32 for floats, else those that share scales). A group holds

    scales [outputs], then biases [outputs] (neither for floats, no biases if symmetric), up to a whole cache line
    [inputs of the group][wide segments], then [inputs of the group][narrow segments], up to a whole cache line

A wide segment holds one input's values for 4 vectors of outputs (8 if they have 4 bits), a narrow one for 1 (2); narrow
ones hold the outputs that fill no wide one. Rows and inputs that do not exist are 0. Integers are written so that
interleaving the bytes of four inputs, which CPUs do within 16 bytes, gives vectors [16 outputs][4 inputs] for dot
products: output 16k + i of a wide segment is byte 16 * (i // 4) + 4k + i % 4, of a narrow one byte i. Of 4 bits, the
second half of a segment's outputs are the high halves of the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from llvmlite import ir

from cpu_kernels import simd
from cpu_kernels.simd import I8, I16, I32, B
from cpu_kernels.tiles import Layout

LINE = 64


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

    def outputs(self, wide: bool) -> int:
        """Outputs of a segment."""
        return 16 * (4 if wide else 1) * (2 if self.bits == 4 else 1)

    def segment_bytes(self, wide: bool) -> int:
        """Bytes of a segment of one input."""
        return 16 * (4 if wide else 1) * (1 if self.bits else self.number_bytes)

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


def load_segment(b: Any, address: Any, wide: bool) -> Any:
    """The bytes of one input's segment of integers."""
    return b.load(simd.pointer(b, address, ir.VectorType(I8, 64 if wide else 16)), align=1)


def interleaved(b: Any, rows: list[Any]) -> list[Any]:
    """Bytes of a segment of 4 inputs as vectors i8x64 of [16 outputs][4 inputs]."""
    if rows[0].type.count == 16:
        words = [_merged(b, x, y, 0, 16) for x, y in (rows[:2], rows[2:])]
        return [_merged(b, *(_words(b, v) for v in words), 0, 16)]
    low, high = ([_merged(b, x, y, start, 8) for x, y in (rows[:2], rows[2:])] for start in (0, 8))
    pairs = [[_words(b, v) for v in part] for part in (low, high)]
    return [_merged(b, *part, start, 4) for part in pairs for start in (0, 4)]


def _merged(b: Any, x: Any, y: Any, start: int, count: int) -> Any:
    """Elements of x and y in turn: of each run of 16 bytes (or of all, if `count` says so) `count` from `start` on."""
    n, run = x.type.count, 128 // x.type.element.width
    order = [at + i + which for at in range(start, n, max(run, count)) for i in range(count) for which in (0, n)]
    merged = b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(order)), order))
    return b.bitcast(merged, B.llvm) if merged.type.count * merged.type.element.width == 512 else merged


def _words(b: Any, v: Any) -> Any:
    return b.bitcast(v, ir.VectorType(I16, v.type.count // 2))
