"""AMX's tile instructions on plain memory, so that kernels which use them can be checked on any machine.

The tiles are one variable of a kernel's machine code: kernels with emulated tiles must run on one thread only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from cpu_kernels.amx import Tiles, configuration
from cpu_kernels.simd import I8, I16, I32, I64, pointer

STATE = ir.ArrayType(I8, 64 + 8 * 1024)
"""The configuration, then the tiles."""


class EmulatedTiles(Tiles):
    """Tiles in memory. A tile that was not configured, or not released since, has no rows."""

    # The cache of kernels knows them by name, and does not see changes to this file.
    name = f"emulated {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]}"

    def configure(self, b: Any, shapes: dict[int, tuple[int, int]]) -> None:
        unused = b.icmp_unsigned("==", b.load(pointer(b, _state(b), I8)), I8(0))
        for i, byte in enumerate(configuration(shapes)):
            b.store(b.select(unused, I8(byte), I8(0)), pointer(b, b.add(_state(b), I64(i)), I8))
        for tile in range(8):
            self.zero(b, tile)

    def release(self, b: Any) -> None:
        for i in range(64):
            b.store(I8(0), pointer(b, b.add(_state(b), I64(i)), I8))

    def zero(self, b: Any, tile: int) -> None:
        with cgutils.for_range(b, I64(1024)) as loop:
            b.store(I8(0), pointer(b, b.add(_place(b, tile), loop.index), I8))

    def load(self, b: Any, tile: int, address: Any, stride: int) -> None:
        self.zero(b, tile)
        _copy(b, tile, address, stride, _place(b, tile), 64)

    def store(self, b: Any, tile: int, address: Any, stride: int) -> None:
        _copy(b, tile, _place(b, tile), 64, address, stride)

    def dot(self, b: Any, sums: int, signed: int, unsigned: int) -> None:
        rows, columns = _shape(b, sums)
        _, inputs = _shape(b, signed)
        with (
            cgutils.for_range(b, rows) as m,
            cgutils.for_range(b, b.lshr(columns, I64(2))) as n,
            cgutils.for_range(b, inputs) as i,
        ):
            quad, byte = b.lshr(i.index, I64(2)), b.and_(i.index, I64(3))
            target = pointer(b, _at(b, sums, m.index, b.shl(n.index, I64(2))), I32)
            x = b.load(pointer(b, _at(b, signed, m.index, i.index), I8))
            y = b.load(pointer(b, _at(b, unsigned, quad, b.add(b.shl(n.index, I64(2)), byte)), I8))
            b.store(b.add(b.load(target), b.mul(b.sext(x, I32), b.zext(y, I32))), target)


def _state(b: Any) -> Any:
    variable = b.module.globals.get("emulated_tiles")
    if variable is None:
        variable = ir.GlobalVariable(b.module, STATE, "emulated_tiles")
        # One for all modules of a kernel.
        variable.linkage, variable.align, variable.initializer = "linkonce_odr", 64, ir.Constant(STATE, None)
    return b.ptrtoint(variable, I64)


def _place(b: Any, tile: int) -> Any:
    return b.add(_state(b), I64(64 + 1024 * tile))


def _at(b: Any, tile: int, row: Any, column: Any) -> Any:
    return b.add(_place(b, tile), b.add(b.mul(row, I64(64)), column))


def _shape(b: Any, tile: int) -> tuple[Any, Any]:
    """Rows of a tile, and bytes of a row."""
    rows = b.load(pointer(b, b.add(_state(b), I64(48 + tile)), I8))
    columns = b.load(pointer(b, b.add(_state(b), I64(16 + 2 * tile)), I16))
    return b.zext(rows, I64), b.zext(columns, I64)


def _copy(b: Any, tile: int, source: Any, source_stride: int, target: Any, target_stride: int) -> None:
    rows, columns = _shape(b, tile)
    with cgutils.for_range(b, rows) as row, cgutils.for_range(b, columns) as column:
        x = b.add(b.add(source, b.mul(row.index, I64(source_stride))), column.index)
        y = b.add(b.add(target, b.mul(row.index, I64(target_stride))), column.index)
        b.store(b.load(pointer(b, x, I8)), pointer(b, y, I8))
