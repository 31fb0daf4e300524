"""Intel's tile registers (AMX): eight of up to 16 rows of 64 bytes, and products of them. And whether we may use them.

Tiles must be configured before their use, and released after it: a thread that holds none costs the system less to
suspend, and other libraries' own configurations are not disturbed.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys

from llvmlite import ir
from numba.core import cgutils

from cpu_kernels.simd import I8, I64, call, features, pointer

ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18
NEEDED = frozenset({"amx-tile", "amx-int8", "avx512f", "avx512vnni"})


def configuration(shapes: dict[int, tuple[int, int]]) -> bytes:
    """The 64 bytes that give tiles their shapes.

    Args:
        shapes: by number of a tile: its rows, and bytes of a row. Tiles without a shape cannot be used.
    """
    data = bytearray(64)
    data[0] = 1
    for tile, (rows, row_bytes) in shapes.items():
        data[16 + 2 * tile] = row_bytes
        data[48 + tile] = rows
    return bytes(data)


class Tiles:
    """Writes LLVM IR that works on tiles, which go by their numbers. Addresses and strides are int64."""

    name = "amx"

    def configure(self, b, shapes):
        """Shapes the tiles (see `configuration`); all are zeros then."""
        data = ir.Constant(ir.ArrayType(I8, 64), bytearray(configuration(shapes)))
        place = cgutils.global_constant(b.module, "tile_shapes", data)
        _tile_op(b, "ldtilecfg", b.bitcast(place, I8.as_pointer()))

    def release(self, b):
        """Back to the state of a thread that never used tiles."""
        _tile_op(b, "tilerelease")

    def zero(self, b, tile):
        _tile_op(b, "tilezero", I8(tile))

    def load(self, b, tile, address, stride):
        """Fills a tile with rows that lie `stride` bytes apart."""
        _tile_op(b, "tileloadd64", I8(tile), pointer(b, address, I8), I64(stride))

    def store(self, b, tile, address, stride):
        _tile_op(b, "tilestored64", I8(tile), pointer(b, address, I8), I64(stride))

    def dot(self, b, sums, signed, unsigned):
        """sums[m, n] += sum over k and i < 4 of signed[m, 4k + i] * unsigned[k, 4n + i]: bytes, summed as int32."""
        _tile_op(b, "tdpbsud", I8(sums), I8(signed), I8(unsigned))


def _tile_op(b, name, *values):
    call(b, f"llvm.x86.{name}", ir.VoidType(), values)


_TILES = Tiles()


def tiles() -> Tiles | None:
    """What products with panels of tokens are to be made with; None where vectors must do."""
    return None if obstacle() else _TILES


@functools.cache
def obstacle() -> str:
    """Why tiles cannot be used, "" if they can.

    The first call asks Linux to let this process use them, all its threads and children by fork included. A process
    that was refused would be killed by its first tile instruction, so this is asked before kernels that have any are
    chosen, also if they were compiled long ago.
    """
    missing = NEEDED - features()
    if missing:
        return f"the CPU that kernels are compiled for has no {', '.join(sorted(missing))}"
    if sys.platform != "linux":
        return "permission to use it can only be asked of Linux"
    refusal = _ask()
    return f"Linux refuses the tile registers: {os.strerror(refusal)}" if refusal else ""


def _ask() -> int:
    """Asks for permission. Returns 0 or the number of the error."""
    libc = ctypes.CDLL(None, use_errno=True)
    values = (ctypes.c_long(n) for n in (ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA))
    return ctypes.get_errno() if libc.syscall(*values) else 0
